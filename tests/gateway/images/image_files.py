"""Image files that Pillow does not write: odd but good ones, and those that ask for much work."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int = 97, height: int = 83, channels: int = 3) -> Image.Image:
    """No two of its pixels are alike, whichever way it is turned."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def segment(marker: int, payload: bytes = b"") -> bytes:
    """Of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload


def after_start(jpeg: bytes, inserted: bytes) -> bytes:
    """The file with more after its first segment."""
    at = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:at] + inserted + jpeg[at:]


def with_scans(jpeg: bytes, num_more: int) -> bytes:
    """A progressive one whose last scan comes so many times more."""
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * num_more + jpeg[-2:]


def scan_bomb(num_scans: int, width: int = 700, height: int = 700) -> bytes:
    """Each scan takes a pass over all of the image, and 36 bytes or fewer."""
    flat = saved(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    return with_scans(flat, num_scans - flat.count(b"\xff\xda"))


def chunk(kind: bytes, payload: bytes = b"") -> bytes:
    """Of a PNG."""
    checksum = zlib.crc32(kind + payload)
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", checksum)


def before(kind: bytes, png: bytes, inserted: bytes) -> bytes:
    """The PNG with more in front of its first chunk of that kind."""
    at = png.index(kind) - 4
    return png[:at] + inserted + png[at:]


def interlaced(pixels: np.ndarray) -> bytes:
    """A PNG whose pixels [height, width, channels], of 8 or 16 bits, come in seven passes."""
    height, width, channels = pixels.shape
    rows = b""
    for x, y, across, down in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        for row in pixels[y::down, x::across]:
            rows += b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes()
    color = {1: 0, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, pixels.itemsize * 8, color, 0, 0, 1)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + body


def exif(orientation: int) -> bytes:
    """As cameras write it, some other fields before it."""
    entries = ((0x010F, 2, 4, b"own\0"), (0x0112, 3, 1, struct.pack("<HH", orientation, 0)))
    fields = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + fields + bytes(4)


def endless_exif(num_entries: int = 65_535) -> bytes:
    """A directory in which each of so many fields says that it has the whole of it."""
    size = 12 * num_entries
    fields = b"".join(struct.pack("<HHLL", tag, 7, size, 8) for tag in range(num_entries))
    return b"II*\0" + struct.pack("<LH", 8, num_entries) + fields + struct.pack("<L", 8)


def webp_of_frames(num_frames: int, width: int = 96, height: int = 80) -> bytes:
    """An animation of one pixel a frame."""

    def three(number: int) -> bytes:
        return struct.pack("<I", number)[:3]

    def part(kind: bytes, payload: bytes) -> bytes:
        return kind + struct.pack("<I", len(payload)) + payload + bytes(len(payload) % 2)

    pixel = saved(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    frame = part(b"ANMF", bytes(12) + three(10) + bytes(1) + pixel)
    head = part(b"VP8X", b"\x02\0\0\0" + three(width - 1) + three(height - 1))
    body = b"WEBP" + head + part(b"ANIM", bytes(6)) + frame * num_frames
    return b"RIFF" + struct.pack("<I", len(body)) + body
