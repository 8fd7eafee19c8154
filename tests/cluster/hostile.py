"""What hostile callers send, as bytes: the table KINDS has a row for each kind of attack."""

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
FORM = "multipart/form-data; boundary=xxBxx"
END = b"--xxBxx--\r\n"
MB = 2**20


class Hostile(NamedTuple):
    """A kind of attack: the pieces to send on each of its connections, `pause_s` apart."""

    pieces: Callable[[], Iterator[bytes]]
    num_connections: int = 1
    pause_s: float = 0.0


def head(path: str = GENERATIONS, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: a", *lines, "", "")).encode("latin-1")


def post(
    body: bytes, path: str = GENERATIONS, kind: str = "application/json", *lines: str
) -> Iterator[bytes]:
    """Yield a complete request, after which the connection ends."""
    length = f"Content-Length: {len(body)}"
    yield head(path, f"Content-Type: {kind}", length, "Connection: close", *lines)
    for start in range(0, len(body), MB):
        yield body[start : start + MB]


def plain(**fields: object) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "a ring", "size": "64x64"} | fields).encode()


def part(data: bytes, name: str = "prompt", more: str = "") -> bytes:
    said = f'--xxBxx\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return said.encode() + data + b"\r\n"


def form(*parts: bytes, kind: str = FORM) -> Iterator[bytes]:
    return post(b"".join(parts) + END, EDITS, kind)


def edit(image: bytes) -> Iterator[bytes]:
    return form(part(b"a ring"), part(b"tiny", "model"), part(image, "image", '; filename="a"'))


def edit_in_json(image: str) -> Iterator[bytes]:
    return post(plain(image=image), EDITS)


# Images.


def saved(format: str, width: int, height: int, mode: str = "L", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), 128).save(file, format, **options)
    return file.getvalue()


def noise(format: str, side: int = 96) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def jpeg_of_scans(num_scans: int) -> bytes:
    """Return a progressive JPEG that repeats its last scan; each one is a pass over all blocks."""
    data = saved("JPEG", 4000, 5000, progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * num_scans + data[-2:]


def jpeg_of_comments(num: int) -> bytes:
    data = noise("JPEG")
    return data[:2] + b"\xff\xfe\x00\x02" * num + data[2:]


def jpeg_of_junk(num_bytes: int) -> bytes:
    """Return a JPEG with restart markers inside of a scan, where a decoder expects none."""
    data = noise("JPEG")
    return data[:-2] + b"\xff\xd0" * (num_bytes // 2) + data[-2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    """Return a valid PNG with these chunks after its header."""
    data = noise("PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def png_head(width: int, height: int, depth: int, color: int, interlaced: int = 0) -> bytes:
    told = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    data = chunk(b"IDAT", zlib.compress(bytes(20 * MB), 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", told) + data


def webp_of_canvas(side: int) -> bytes:
    canvas = bytes(4) + (side - 1).to_bytes(3, "little") * 2
    data = b"WEBPVP8X" + struct.pack("<I", 10) + canvas
    return b"RIFF" + struct.pack("<I", len(data)) + data


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Connections.


def chunked(chunks: bytes) -> Iterator[bytes]:
    yield head(GENERATIONS, "Content-Type: application/json", "Transfer-Encoding: chunked")
    for start in range(0, len(chunks), MB):
        yield chunks[start : start + MB]


def slowly(body: bytes, *lines: str) -> Iterator[bytes]:
    """Yield a request whose body comes one byte at a time."""
    yield head(GENERATIONS, "Content-Type: application/json", *lines)
    for byte in body:
        yield bytes([byte])


def odd_head(*lines: str, body: bytes = plain()) -> Iterator[bytes]:
    yield head(GENERATIONS, "Content-Type: application/json", *lines) + body


def many_headers(num: int, num_bytes: int) -> Iterator[bytes]:
    yield b"GET /health HTTP/1.1\r\nHost: a\r\n"
    for number in range(num):
        yield b"X-%d: " % number + b"a" * num_bytes + b"\r\n"


def empty_streams() -> bytes:
    return gzip.compress(b"") * 200_000


LENGTH = f"Content-Length: {len(plain())}"
PACKED = "Content-Encoding: gzip"
KIND = "application/json"
NAME = '; filename="a"'
PUNYCODE = f"{FORM}; charset=punycode"
KINDS: dict[str, Hostile] = {
    "json: lists in lists": Hostile(lambda: post(b"[" * 99_000)),
    "json: values": Hostile(lambda: post(b"[" + b"1," * 20_000_000)),
    "json: fields": Hostile(lambda: post(plain(**{f"f{i}": 1 for i in range(90_000)}))),
    "json: a number of 20 MB": Hostile(lambda: post(b'{"seed": ' + b"9" * 20 * MB + b"}")),
    "json: a resolution of 400 digits": Hostile(lambda: post(plain(resolution=10**400))),
    "json: a prompt of 60 MB": Hostile(lambda: post(plain(prompt="a" * 60 * MB))),
    "json: a name of 60 MB": Hostile(lambda: post(plain(**{"image" * 12 * MB: "x"}))),
    "json: half a pair": Hostile(lambda: post(b'{"prompt": "' + b"\\u00e9" * MB + b'\\ud800"}')),
    "json: utf-16": Hostile(lambda: post(plain().decode().encode("utf-16"))),
    "json: spaces of 60 MB": Hostile(lambda: post(b" " * 60 * MB + plain())),
    "body: too large": Hostile(lambda: post(bytes(80 * MB))),
    "body: a lie of 10 GB": Hostile(lambda: odd_head("Content-Length: 10000000000")),
    "body: chunks of a byte": Hostile(lambda: chunked(b"1\r\n \r\n" * 2 * MB)),
    "body: a long chunk's head": Hostile(lambda: chunked(b"1;" + b"a" * 20 * MB)),
    "body: bomb of gzip": Hostile(
        lambda: post(gzip.compress(bytes(500 * MB), 1), GENERATIONS, KIND, PACKED)
    ),
    "body: empty gzip streams": Hostile(lambda: post(empty_streams(), GENERATIONS, KIND, PACKED)),
    "form: punycode": Hostile(lambda: form(part(b"a-" + b"9" * 3 * MB), kind=PUNYCODE)),
    "form: a name's codec": Hostile(
        lambda: form(part(b"a", more="; filename*=punycode''" + "9" * 4000))
    ),
    "form: parts": Hostile(lambda: form(part(b"a") * 200_000)),
    "form: files": Hostile(lambda: form(part(b"a", "image", NAME) * 200_000)),
    "form: heads of a part": Hostile(lambda: form(b"--xxBxx\r\n" + b"a: b\r\n" * 500_000)),
    "form: a part's long head": Hostile(lambda: form(part(b"a", more=";" * 30 * MB))),
    "form: near its end": Hostile(lambda: form(part(b"\r\n--xxBx" * 6 * MB))),
    "form: a long boundary": Hostile(lambda: form(kind=FORM + "a" * 15_000)),
    "form: its quotes": Hostile(lambda: form(kind=FORM + '; a="' + ";" * 15_000)),
    "form: cut": Hostile(lambda: post(part(b"a ring")[:-9], EDITS, FORM)),
    "image: scans": Hostile(lambda: edit(jpeg_of_scans(1500)), 3),
    "image: comments": Hostile(lambda: edit(jpeg_of_comments(4 * MB))),
    "image: junk in a scan": Hostile(lambda: edit(jpeg_of_junk(16 * MB))),
    "image: chunks": Hostile(lambda: edit(png_with(chunk(b"teXt", b"") * MB))),
    "image: packed text": Hostile(
        lambda: edit(png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60 * MB)))))
    ),
    "image: packed profile": Hostile(
        lambda: edit(png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(60 * MB)))))
    ),
    "image: 2^31 a side": Hostile(lambda: edit(png_head(2**31 - 1, 2**31 - 1, 8, 2))),
    "image: 16 bits a channel": Hostile(lambda: edit(png_head(4400, 4400, 16, 6))),
    "image: interlaced": Hostile(lambda: edit(png_head(4400, 4400, 8, 2, 1)), 3),
    "image: a canvas": Hostile(lambda: edit(webp_of_canvas(16_383))),
    "image: 20 megapixels": Hostile(lambda: edit(saved("JPEG", 4400, 4400, "RGB")), 4),
    "image: cut": Hostile(lambda: edit(noise("JPEG", 2000)[:-9000])),
    "base64: lines": Hostile(lambda: edit_in_json("\n" * 20 * MB + in_base64(noise("PNG")))),
    "base64: none": Hostile(lambda: edit_in_json("\u00e9" * 5 * MB)),
    "base64: ends": Hostile(lambda: edit_in_json("A" + "=" * 20 * MB)),
    "base64: data of data": Hostile(lambda: edit_in_json("data:;base64," * MB)),
    "url: this machine": Hostile(lambda: edit_in_json("http://127.0.0.1:8265/api")),
    "url: a number": Hostile(lambda: edit_in_json("http://2130706433/")),
    "url: metadata": Hostile(lambda: edit_in_json("http://169.254.169.254/latest")),
    "url: of nobody": Hostile(lambda: edit_in_json("http://no.such.host.invalid/a.png"), 10),
    "url: long": Hostile(lambda: edit_in_json("http://a" + ".a" * 20 * MB)),
    "smuggling: two lengths": Hostile(lambda: odd_head(LENGTH, "Content-Length: 5")),
    "smuggling: length and chunks": Hostile(lambda: odd_head(LENGTH, "Transfer-Encoding: chunked")),
    "smuggling: a signed length": Hostile(lambda: odd_head("Content-Length: +5")),
    "smuggling: other chunks": Hostile(lambda: odd_head("Transfer-Encoding: xchunked")),
    "smuggling: a space": Hostile(lambda: odd_head(LENGTH.replace(":", " :"))),
    "smuggling: a fold": Hostile(lambda: odd_head("X-A: b\r\n " + LENGTH)),
    "smuggling: a nul": Hostile(lambda: odd_head(LENGTH, "X-A: \0")),
    "head: without an end": Hostile(lambda: many_headers(60, MB), 4),
    "head: lines": Hostile(lambda: many_headers(200_000, 1)),
    "head: a long path": Hostile(lambda: iter([head("/" + "a" * 8 * MB, method="GET")])),
    "head: an id": Hostile(lambda: odd_head(LENGTH, f"X-Request-ID: {'a' * 5000}")),
    "head: an upgrade": Hostile(lambda: odd_head(LENGTH, "Connection: Upgrade", "Upgrade: h2c")),
    "slow: bodies": Hostile(lambda: slowly(b" " * 8, "Content-Length: 5000"), 300, 1.0),
    "slow: bodies that do not begin": Hostile(lambda: slowly(b"", "Content-Length: 9"), 300, 9.0),
    "slow: heads": Hostile(lambda: iter([b"GET / HT", *[b"a"] * 8]), 300, 1.0),
    "slow: nothing at all": Hostile(lambda: iter([b"", b""]), 600, 6.0),
    "slow: a body after its answer": Hostile(
        lambda: iter([head("/health", "Content-Length: 500", method="GET"), *[b"a"] * 8]), 50, 1.0
    ),
}
