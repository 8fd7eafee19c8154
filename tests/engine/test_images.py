"""Rasters survive Pillow, and come out as the file that was asked for."""

import io
import random

import pytest
from PIL import Image

from flux_ray.engine.images import encode_image, image_for, raster_for
from flux_ray.request import Encoding, ImageFormat, RgbImage

RASTER = RgbImage(48, 32, random.Random(0).randbytes(48 * 32 * 3))


def test_there_and_back() -> None:
    assert raster_for(image_for(RASTER)) == RASTER


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_the_file_is_of_the_format(format: ImageFormat) -> None:
    image = Image.open(io.BytesIO(encode_image(RASTER, Encoding(format))))
    assert (image.format or "").lower() == format
    assert image.size == (48, 32)


def test_png_loses_nothing() -> None:
    image = Image.open(io.BytesIO(encode_image(RASTER, Encoding("png", quality=1))))
    assert raster_for(image) == RASTER


def test_the_part_to_keep_is_cropped_before_it_is_a_file() -> None:
    image = Image.open(io.BytesIO(encode_image(RASTER, Encoding("png", cropped_to=(3, 2, 43, 31)))))
    assert raster_for(image) == raster_for(image_for(RASTER).crop((3, 2, 43, 31)))
    assert image.size == (40, 29)


def test_quality_counts() -> None:
    low, high = (encode_image(RASTER, Encoding("jpeg", quality)) for quality in (10, 95))
    assert len(low) < len(high)
