"""Our PNG files are read by others, to the pixel, and carry nothing else."""

import io
import random
import zlib

import pytest
from PIL import Image

from flux_ray.engine.images import encode_image, encode_png, image_for, raster_for
from flux_ray.request import Encoding, ImageFormat, RgbImage


def noise(width: int, height: int, seed: int = 0) -> RgbImage:
    return RgbImage(width, height, random.Random(seed).randbytes(width * height * 3))


def flat(width: int, height: int) -> RgbImage:
    return RgbImage(width, height, b"\x07\xff\x00" * (width * height))


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 2), (48, 32), (333, 257)])
@pytest.mark.parametrize("make", [noise, flat])
def test_what_is_read_is_what_was_written(make: type[RgbImage], size: tuple[int, int]) -> None:
    raster = make(*size)
    image = opened(encode_png(raster))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", size)
    assert raster_for(image) == raster


def test_every_chunk_is_whole() -> None:
    """Pillow reads on over a wrong checksum of the pixels; others do not."""
    data, names = encode_png(noise(48, 32))[8:], []
    while data:
        length, name = int.from_bytes(data[:4], "big"), data[4:8]
        inside, checksum = data[4 : 8 + length], data[8 + length : 12 + length]
        assert zlib.crc32(inside) == int.from_bytes(checksum, "big")
        if name == b"IDAT":
            assert len(zlib.decompress(inside[4:])) == 32 * (1 + 48 * 3)
        names.append(name)
        data = data[12 + length :]
    assert names == [b"IHDR", b"IDAT", b"IEND"]


def test_it_says_what_pillows_file_says() -> None:
    raster, buffer = noise(48, 32), io.BytesIO()
    image_for(raster).save(buffer, "PNG")
    ours, pillows = opened(encode_png(raster)), opened(buffer.getvalue())
    assert (ours.info, ours.mode, ours.size) == (pillows.info, pillows.mode, pillows.size)
    assert ours.tobytes() == pillows.tobytes()


@pytest.mark.parametrize("size", [(96, 64), (24, 16), (50, 31), (48, 32)])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_file_has_the_size_that_is_asked_for(format: ImageFormat, size: tuple[int, int]) -> None:
    raster = noise(48, 32)
    image = opened(encode_image(raster, Encoding(format, scaled_to=size)))
    assert ((image.format or "").lower(), image.size) == (format, size)
    if format == "png":
        expected = image_for(raster).resize(size, Image.Resampling.LANCZOS)
        assert image.tobytes() == expected.tobytes()


def test_the_size_that_is_generated_is_not_scaled() -> None:
    raster = noise(48, 32)
    assert encode_image(raster, Encoding(scaled_to=(48, 32))) == encode_image(raster, Encoding())
