"""Pixels: rasters to and from Pillow images, and to encoded bytes.

PNG files, in a tenth of the time that Pillow takes for files of the same size.
"""

import io
import struct

import numpy as np
from isal import isal_zlib
from PIL import Image

from flux_ray.request import Encoding, RgbImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of ISA-L's four. Its other levels are no smaller: `make bench NAME=image_encoding`.
LEVEL = 2
BITS_PER_CHANNEL, RGB = 8, 2
# A row as its difference to the row above.
FILTER_UP = 2


def encode_png(raster: RgbImage) -> bytes:
    """Return the raster as a PNG file; nothing of it is lost."""
    return file_of(raster, isal_zlib.compress(filtered(raster), LEVEL))


def file_of(raster: RgbImage, data: bytes) -> bytes:
    """Return the PNG file of a raster's filtered rows, which are compressed already."""
    header = struct.pack("!IIBBBBB", raster.width, raster.height, BITS_PER_CHANNEL, RGB, 0, 0, 0)
    return b"".join(
        (SIGNATURE, *chunk(b"IHDR", header), *chunk(b"IDAT", data), *chunk(b"IEND", b""))
    )


def filtered(raster: RgbImage) -> np.ndarray:
    """Return the rows as PNG compresses them: each its filter's number, then differences."""
    rows = np.frombuffer(raster.rgb, np.uint8).reshape(raster.height, raster.width * 3)
    lines = np.empty((raster.height, 1 + raster.width * 3), np.uint8)
    lines[:, 0] = FILTER_UP
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    return lines


def chunk(name: bytes, data: bytes) -> tuple[bytes, ...]:
    """Return the parts of a PNG chunk: length, name, data, checksum."""
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(name))
    return struct.pack("!I", len(data)), name, data, struct.pack("!I", checksum)


def image_for(raster: RgbImage) -> Image.Image:
    """The Pillow image of a raster."""
    return Image.frombytes("RGB", (raster.width, raster.height), raster.rgb)


def raster_for(image: Image.Image) -> RgbImage:
    """The raster of an RGB Pillow image."""
    return RgbImage(image.width, image.height, image.convert("RGB").tobytes())


def scaled(raster: RgbImage, size: tuple[int, int]) -> RgbImage:
    """Return the raster with this width and height."""
    return raster_for(image_for(raster).resize(size, Image.Resampling.LANCZOS))


def encode_image(raster: RgbImage, encoding: Encoding) -> bytes:
    """The raster as a png, jpeg or webp file, scaled to the size that is asked for."""
    size = encoding.scaled_to
    if size is not None and size != (raster.width, raster.height):
        raster = scaled(raster, size)
    if encoding.format == "png":
        return encode_png(raster)
    buffer = io.BytesIO()
    image_for(raster).save(buffer, format=encoding.format, quality=encoding.quality)
    return buffer.getvalue()
