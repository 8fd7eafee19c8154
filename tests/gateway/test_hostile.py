"""What attackers send to the image routes: every row is a 4xx in our words, in little memory."""

import asyncio
import base64
import io
import json
import resource
import struct
import tracemalloc
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image

from flux_ray.config.gateway import Uploads
from flux_ray.gateway.api import build_api

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
PROMPT = {"prompt": "a ring"}
# The tests' limits are 1 MB a body and 500,000 pixels: a whole 100 MB would stand out.
MAX_TRACED_BYTES = 24 * 2**20
MAX_RESIDENT_BYTES = 64 * 2**20
INSIDES = (
    "Traceback",
    'File "',
    ".py",
    "flux_ray",
    "site-packages",
    "/tmp",
    "/home",
    "passwd",
    "PIL",
    "Pillow",
    "starlette",
    "pydantic",
    "httpx",
    "httpcore",
    "zlib",
    "binascii",
    "object at 0x",
    "Errno",
    "127.0.0.1",
    "169.254",
    "root:",
    "secret",
)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, color: int = 2, *extra: bytes) -> bytes:
    """A PNG that says it is that large, with hardly any data."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(extra) + data


def saved(format: str, size: tuple[int, int] = (96, 80)) -> bytes:
    """An image of noise, for flat colour packs too well to be cut."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def deflated_png(width: int, height: int) -> bytes:
    """All of its pixels are there, and black."""
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


GOOD = saved("PNG")
SMALL = deflated_png(64, 64)
TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 50_000_000))
PROFILE_BOMB = chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 50_000_000))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
FILES = {
    "huge declared size": png(2**31 - 1, 2**31 - 1),
    "long and thin": png(2**31 - 1, 64),
    "16 bits a channel": png(30_000, 30_000, 16, 6),
    "16-bit grey": png(30_000, 30_000, 16, 0),
    "one bit a pixel": png(100_000, 100_000, 1, 0),
    "no pixels": png(0, 0),
    "many real pixels": deflated_png(5000, 5000),
    "just too many pixels": deflated_png(708, 708),
    "packed text": png(64, 64, 8, 2, TEXT_BOMB),
    "packed profile": png(64, 64, 8, 2, PROFILE_BOMB),
    "too little data": png(600, 600),
    "empty": b"",
    "signature only": GOOD[:8],
    "truncated png": GOOD[: len(GOOD) // 2],
    "truncated jpeg": saved("JPEG")[:2000],
    "truncated webp": saved("WEBP")[:2000],
    "gif": saved("GIF"),
    "tiff": saved("TIFF"),
    "bmp": saved("BMP"),
    "jpeg 2000": saved("JPEG2000"),
    "svg": SVG,
    "gif and png": b"GIF89a" + GOOD,
    "pdf and jpeg": b"%PDF-1.4\n" + saved("JPEG"),
    "zip and png": b"PK\x03\x04" + GOOD,
    "script": b"#!/bin/sh\ncat /etc/passwd\n",
    "postscript": b"%!PS-Adobe-3.0\n(/etc/passwd) run\n",
    "pickle": b"cos\nsystem\n(S'id'\ntR.",
    "too many bytes": GOOD + b"\0" * 200_000,
}
TEXTS = {
    "no base64": "!!!!",
    "letters of other alphabets": "\u0430\u0431\u0432\u0433",
    "one letter too many": base64.b64encode(GOOD).decode()[:-3] + "=A",
    "data without base64": "data:image/png,abc",
    "data without end": "data:image/png;base64",
    "long data prefix": "data:" + "a" * 100_000 + ";base64,aaaa",
    "svg as png": "data:image/png;base64," + base64.b64encode(SVG).decode(),
    "too long base64": "A" * 400_000,
    "bomb": base64.b64encode(png(60_000, 60_000)).decode(),
    "path": "/etc/passwd",
    "relative path": "../../../etc/passwd",
}
VALUES = {
    "deep": json.loads("[" * 60 + "]" * 60),
    "number": 7,
    "object": {"path": "/etc/passwd"},
    "file id": {"file_id": "file-123"},
    "list in object": {"image_url": {"url": {"url": {"url": {"url": "x"}}}}},
    "50 references": [base64.b64encode(SMALL).decode()] * 50,
    "50 urls": [{"image_url": f"http://8.8.8.8/{number}"} for number in range(50)],
}
REQUEST_IDS = ("a\r\nx-evil: 1", "a\nb", "a b", "\x00", "é", "a" * 129, "<script>")
NAMES = (
    "../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "/etc/passwd",
    "a\0.png",
    'x"; name="prompt',
    "\r\nx-evil: 1",
    "a" * 1000,
)


async def check(client: httpx.AsyncClient, *args, statuses=(400,), **options) -> httpx.Response:
    """Posts it; the answer is an error of ours, and was cheap."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        answer = await client.post(*args, **options)
        traced_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Pixels are not Python's memory.
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024
    assert answer.status_code in statuses, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.content) < 1000
    assert [word for word in INSIDES if word in answer.text] == []
    assert traced_bytes < MAX_TRACED_BYTES
    assert grown < MAX_RESIDENT_BYTES
    return answer


@pytest.mark.parametrize("name", FILES)
async def test_files(client, handles, name):
    await check(client, EDITS, data=PROMPT, files={"image": ("a.png", FILES[name])})
    assert handles.requests == []


@pytest.mark.parametrize("name", FILES)
async def test_files_as_base64(client, handles, name):
    packed = base64.b64encode(FILES[name]).decode()
    body = PROMPT | {"images": [{"image_url": f"data:image/png;base64,{packed}"}]}
    await check(client, EDITS, json=body)
    assert handles.requests == []


@pytest.mark.parametrize("name", FILES)
async def test_masks(client, handles, name):
    """After a good image, as a file and as base64."""
    files = {"image": ("a.png", GOOD), "mask": ("m.png", FILES[name])}
    answer = await check(client, EDITS, data=PROMPT, files=files)
    assert answer.json()["error"]["param"] == "mask"
    good, bad = (base64.b64encode(data).decode() for data in (GOOD, FILES[name]))
    body = PROMPT | {"image": good, "mask_image": {"image_url": f"data:image/png;base64,{bad}"}}
    answer = await check(client, EDITS, json=body)
    assert answer.json()["error"]["param"] == "mask_image"
    assert handles.requests == []


@pytest.mark.parametrize("field", ["mask", "mask_image"])
@pytest.mark.parametrize("name", VALUES | TEXTS)
async def test_values_of_masks(client, handles, name, field):
    good = base64.b64encode(GOOD).decode()
    body = PROMPT | {"image": good, field: (VALUES | TEXTS)[name]}
    answer = await check(client, EDITS, json=body)
    assert answer.json()["error"]["param"] == field
    assert handles.requests == []


@pytest.mark.parametrize("path", [EDITS, GENERATIONS])
@pytest.mark.parametrize("name", TEXTS)
async def test_texts(client, handles, name, path):
    await check(client, path, json=PROMPT | {"image": TEXTS[name]})
    if path == EDITS:
        await check(client, path, data=PROMPT, files={"image[]": (None, TEXTS[name])})
    assert handles.requests == []


@pytest.mark.parametrize("field", ["image", "images", "url", "ref_images", "reference_image"])
@pytest.mark.parametrize("name", VALUES)
async def test_values(client, handles, name, field):
    answer = await check(client, EDITS, json=PROMPT | {field: VALUES[name]})
    assert answer.json()["error"]["param"] in (field, "image")
    assert handles.requests == []


@pytest.mark.parametrize("as_files", [True, False])
async def test_fifty_parts(client, handles, as_files):
    parts = [("image[]", ("a" if as_files else None, SMALL)) for _ in range(50)]
    await check(client, EDITS, data=PROMPT, files=parts)
    assert handles.requests == []


@pytest.mark.parametrize("length", [None, "104857640", "9" * 5000])
async def test_base64_of_100_mb(client, handles, length):
    sent_bytes = 0

    async def body():
        nonlocal sent_bytes
        yield b'{"prompt": "a ring", "image": "'
        for _ in range(1600):
            sent_bytes += 65536
            yield b"A" * 65536
        yield b'"}'

    headers = {"content-type": "application/json"} | ({"content-length": length} if length else {})
    await check(client, EDITS, content=body(), headers=headers, statuses=(413,))
    assert sent_bytes <= (0 if length else 1_100_000)
    assert handles.requests == []


async def test_slow_body(router, gateway_args, handles):
    async def body():
        yield b'{"prompt":'
        await asyncio.sleep(3)
        yield b'"a ring"}'

    args = gateway_args.model_copy(update={"uploads": Uploads(max_s=0.1)})
    api = build_api(router, args)
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        await check(client, GENERATIONS, content=body(), headers=headers, statuses=(408,))
    assert handles.requests == []


@pytest.mark.parametrize("name", NAMES)
async def test_file_names(client, handles, name):
    """A good image under such a name is an image; a bad one's error does not repeat the name."""
    answer = await client.post(EDITS, data=PROMPT, files={"image": (name, GOOD)})
    assert answer.status_code == 200
    assert len(handles.requests[0].references) == 1
    await check(client, EDITS, data=PROMPT, files={"image": (name, b"no image")})


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"prompt": "a ring", "image": ' + b'{"url": ' * 100_000 + b"1",
        b'{"prompt": "\\ud800", "image": "\\ud800"}',
        b'{"prompt": "a ring", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a ring", "seed": 1e999}',
        b"\xff\xfe{}",
    ],
    ids=["deep list", "deep object", "surrogates", "long number", "infinite seed", "utf-16"],
)
async def test_json(client, handles, body):
    await check(client, EDITS, content=body, headers={"content-type": "application/json"})
    assert handles.requests == []


async def test_a_file_name_longer_than_a_header(client):
    files = {"image": ("a" * 100_000, GOOD)}
    answer = await check(client, EDITS, data=PROMPT, files=files)
    assert answer.json()["error"]["message"] == "the form cannot be read"


async def test_what_follows_an_image_is_not_kept(client, handles):
    files = [("image", ("a", GOOD)), ("image", ("b", GOOD + b"PK\x03\x04<script>"))]
    assert (await client.post(EDITS, data=PROMPT, files=files)).status_code == 200
    first, second = handles.requests[0].references
    assert first.rgb == second.rgb


@pytest.mark.parametrize("host", ["x/?", "a@b", "evil.test:80:80", "", "a/../v1/models", "[::1"])
@pytest.mark.parametrize("path", [EDITS, "/v1/nowhere"])
async def test_host_headers(client, handles, host, path):
    """They neither choose the route nor come back."""
    statuses = (400,) if path == EDITS else (404,)
    answer = await check(client, path, json={}, headers={"host": host}, statuses=statuses)
    assert "evil" not in answer.text + str(answer.headers)


@pytest.mark.parametrize("sent", REQUEST_IDS)
async def test_request_ids(client, sent):
    headers = [(b"x-request-id", sent.encode())]
    answer = await check(client, EDITS, json={}, headers=headers)
    assert answer.headers["x-request-id"] != sent
    assert len(answer.headers["x-request-id"]) == 32
    assert "x-evil" not in answer.headers
