"""An image does not depend on who scaled its references: the gateway early, or the rank."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.gateway import Limits
from flux_ray.engine.api import ImageSpec
from flux_ray.engine.encoding_cache import CachedEncoder
from flux_ray.gateway.images.decode import decode, decode_reference
from flux_ray.gateway.images.masks import fit
from flux_ray.request import ImageRequest, Mask, RgbImage
from tests.engine.generation import finish

TINY, LIMITS = tier_for("tiny"), Limits()
# Of what a rank scales: to the limit, once around it, and long.
SIZES = [(700, 500), (193, 192), (1201, 333)]


def file_of(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def asked(references: tuple[RgbImage, ...], mask: Mask | None = None) -> ImageRequest:
    prompt = "a red circle on a blue background"
    return ImageRequest("id", "tiny", prompt, 128, 112, 1, 1.0, 7, references=references, mask=mask)


def generated(adapter, request: ImageRequest) -> RgbImage:
    conditioning, _ = CachedEncoder(adapter, 0, "cpu").encode(request, ())
    canvas = ImageSpec(request.width, request.height, request.num_steps, request.guidance)
    return adapter.decode(finish(adapter, adapter.prepare(conditioning, canvas, request.seed)))


def early(data: bytes) -> RgbImage:
    limit = TINY.max_reference_pixels
    return decode_reference(data, LIMITS, "image 1", [limit]).raster_for(limit)


@pytest.mark.parametrize("size", SIZES)
def test_a_large_reference_and_a_scaled_one_make_the_same_image(klein_adapter, size):
    files = [file_of(*size, seed=1), file_of(400, 300, seed=2)]
    late = asked(tuple(decode(each, LIMITS, "image 1") for each in files))
    scaled = asked(tuple(map(early, files)))
    assert scaled.references[0].width < size[0]
    assert generated(klein_adapter, scaled) == generated(klein_adapter, late)


@pytest.mark.parametrize("size", [(700, 500), (64, 64)])
def test_under_a_mask_too(klein_adapter, size):
    width, height = size
    marks = np.zeros((height, width), np.uint8)
    marks[height // 4 : height // 2, width // 3 : width // 2] = 255
    files = [file_of(*size, seed=1), file_of(400, 300, seed=2)]
    image, other = (decode(each, LIMITS, "image 1") for each in files)
    late = asked((image, other), Mask(width, height, marks.tobytes()))
    scaled = fit(replace(late, references=(image, early(files[1]))), LIMITS)
    assert (scaled.references[0].width, scaled.mask.height) == (128, 112)
    assert generated(klein_adapter, scaled) == generated(klein_adapter, late)
