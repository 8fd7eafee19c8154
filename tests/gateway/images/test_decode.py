"""Untrusted images: what is refused before it is decoded, and how the rest becomes RGB."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from flux_ray.config.gateway import Limits
from flux_ray.errors import BadReference
from flux_ray.gateway.images.decode import decode

LIMITS = Limits(max_image_bytes=200_000, max_image_pixels=500_000)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it has that size, with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_formats(make_image, format):
    raster = decode(make_image(100, 70, format=format, color="blue"), LIMITS, "image 1")
    assert (raster.width, raster.height, len(raster.rgb)) == (100, 70, 100 * 70 * 3)
    red, green, blue = raster.rgb[:3]
    assert red < 10 and green < 10 and blue > 245


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 200, (200, 200, 200)),
        ("LA", (100, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        ("I;16", 0x8000, (128, 128, 128)),
    ],
)
def test_modes(make_image, mode, color, expected):
    raster = decode(make_image(mode=mode, color=color), LIMITS, "image 1")
    assert tuple(raster.rgb[:3]) == expected


def test_transparent_palette(make_image):
    raster = decode(make_image(mode="P", color=0, transparency=0), LIMITS, "image 1")
    assert tuple(raster.rgb[:3]) == (255, 255, 255)


def test_cmyk(make_image):
    data = make_image(format="JPEG", mode="CMYK", color=(0, 255, 255, 0))
    red, green, blue = decode(data, LIMITS, "image 1").rgb[:3]
    assert red > 240 and green < 15 and blue < 15


def test_sixteen_bit_grey_is_scaled():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    pixels = np.frombuffer(decode(file.getvalue(), LIMITS, "image 1").rgb, np.uint8)
    assert pixels.reshape(64, 64, 3)[..., 0].tolist() == (ramp >> 8).tolist()


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (96, 64), "red")
    image.paste("blue", (48, 0, 96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    raster = decode(file.getvalue(), LIMITS, "image 1")
    assert (raster.width, raster.height) == (64, 96)
    assert tuple(raster.rgb[:3]) == (255, 0, 0)
    assert tuple(raster.rgb[-3:]) == (0, 0, 255)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP", "ICO", "PPM", "JPEG2000"])
def test_other_formats_are_refused(make_image, format):
    with pytest.raises(BadReference, match="image 1 is not a PNG, JPEG or WebP image"):
        decode(make_image(format=format), LIMITS, "image 1")


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n"]
)
def test_no_images(data):
    with pytest.raises(BadReference, match="is not a PNG, JPEG or WebP image"):
        decode(data, LIMITS, "image 1")


@pytest.mark.parametrize("size", [(708, 708), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 70)])
def test_bombs_are_refused_before_they_are_decoded(size):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(BadReference, match="more than 500000 pixels"):
            decode(png_of_size(*size), LIMITS, "image 1")
    assert seen == []


def test_too_many_bytes(make_image):
    with pytest.raises(BadReference, match="larger than 200000 bytes"):
        decode(make_image() + b"\0" * 200_000, LIMITS, "image 1")


@pytest.mark.parametrize("size", [(63, 64), (64, 63), (1, 1)])
def test_too_small(make_image, size):
    with pytest.raises(BadReference, match="smaller than 64 pixels"):
        decode(make_image(*size), LIMITS, "image 1")


def test_too_long(make_image):
    with pytest.raises(BadReference, match="8 times as long as wide"):
        decode(make_image(64, 513), LIMITS, "image 1")


# Pillow warns of odd metadata that it skips.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_never_show_our_insides(format):
    """Cut and altered files either decode or are refused in our own words."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (80, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, format, exif=exif)
    whole = file.getvalue()
    for _ in range(150):
        data = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        for position in generator.integers(0, min(len(data), 400), 4):
            data[position] = generator.integers(0, 256)
        try:
            decode(bytes(data), LIMITS, "image 1")
        except BadReference as error:
            assert str(error).startswith("image 1 ")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated(format):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    with pytest.raises(BadReference, match="image 1 is"):
        decode(file.getvalue()[: len(file.getvalue()) // 2], LIMITS, "image 1")
