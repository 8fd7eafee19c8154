"""Encode finished images as files, and convert them to and from Pillow images.

JPEG and WebP are left to Pillow. PNG is written here with ISA-L's deflate, which takes a tenth of
Pillow's time for files of the same size; `make bench NAME=image_encoding` measures both.
"""

import io
import struct

import numpy as np
from isal import isal_zlib
from PIL import Image

from flux_ray.request import Encoding, RgbImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# One of ISA-L's levels 0 to 3; measured, none of the others makes smaller files.
LEVEL = 2
BITS_PER_CHANNEL, RGB = 8, 2
# PNG's number for the filter that stores a row as its difference to the row above.
FILTER_UP = 2


def encode_image(raster: RgbImage, encoding: Encoding) -> bytes:
    """Return the image as a PNG, JPEG or WebP file, cropped or resized first if `encoding` says so.

    Leaders call it in threads: Pillow and ISA-L release the GIL while they compress.
    """
    if encoding.cropped_to is not None:
        raster = raster_for(image_for(raster).crop(encoding.cropped_to))
    size = encoding.scaled_to
    if size is not None and size != (raster.width, raster.height):
        raster = scaled(raster, size)
    if encoding.format == "png":
        return encode_png(raster)
    buffer = io.BytesIO()
    image_for(raster).save(buffer, format=encoding.format, quality=encoding.quality)
    return buffer.getvalue()


def image_for(raster: RgbImage) -> Image.Image:
    """Return a Pillow image with a copy of these pixels."""
    return Image.frombytes("RGB", (raster.width, raster.height), raster.rgb)


def raster_for(image: Image.Image) -> RgbImage:
    """Return the pixels of a Pillow image, converted to RGB if it has another mode."""
    return RgbImage(image.width, image.height, image.convert("RGB").tobytes())


def scaled(raster: RgbImage, size: tuple[int, int]) -> RgbImage:
    """Return the image resized to `size`, (width, height), with a Lanczos filter."""
    return raster_for(image_for(raster).resize(size, Image.Resampling.LANCZOS))


def encode_png(raster: RgbImage) -> bytes:
    """Return the image as a PNG file, without loss."""
    return file_of(raster, isal_zlib.compress(filtered(raster), LEVEL))


def file_of(raster: RgbImage, data: bytes) -> bytes:
    """Return a complete PNG file around `data`, the filtered and compressed rows of `raster`."""
    header = struct.pack("!IIBBBBB", raster.width, raster.height, BITS_PER_CHANNEL, RGB, 0, 0, 0)
    return b"".join(
        (SIGNATURE, *chunk(b"IHDR", header), *chunk(b"IDAT", data), *chunk(b"IEND", b""))
    )


def filtered(raster: RgbImage) -> np.ndarray:
    """Return the rows as PNG compresses them, uint8 [height, 1 + 3 x width].

    The first byte of each row is the filter's number, the rest are differences modulo 256 to the
    row above. The first row has none above it, so its differences are its own values.
    """
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
