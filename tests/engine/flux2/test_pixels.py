"""Eight bits a channel are to the bit what diffusers' own processor makes of the same pixels."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from flux_ray.engine.images import raster_for
from flux_ray.engine.vae import raster_of

PROCESSOR = VaeImageProcessor()


def as_diffusers_does(pixels: torch.Tensor) -> bytes:
    return raster_for(PROCESSOR.postprocess(pixels, output_type="pil")[0]).rgb


def as_we_do(pixels: torch.Tensor) -> bytes:
    return raster_of(PROCESSOR.postprocess(pixels, output_type="pt")[0]).rgb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_models_pixels_become_the_same_bytes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    pixels = (0.7 * torch.randn(1, 3, 96, 160, generator=generator)).to(dtype)
    assert as_we_do(pixels) == as_diffusers_does(pixels)


def test_what_lies_between_two_values_goes_to_the_same_one() -> None:
    """Every half of 1/255, and the floats just below and above it."""
    halves = (torch.arange(0, 511, dtype=torch.float64) / 2 / 255).float()
    below, above = (torch.nextafter(halves, torch.tensor(to)) for to in (-1.0, 2.0))
    values = torch.cat([halves, below, above]).clamp(0, 1)
    pixels = values.repeat(3).reshape(1, 3, 3, -1)
    expected = (pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    assert raster_of(pixels[0]).rgb == expected.tobytes()


def test_rows_and_channels_keep_their_order() -> None:
    pixels = torch.zeros(3, 2, 4)
    pixels[0, 0, 1] = pixels[1, 1, 3] = 1.0
    raster = raster_of(pixels)
    assert (raster.width, raster.height) == (4, 2)
    generated = np.frombuffer(raster.rgb, np.uint8).reshape(2, 4, 3)
    assert np.argwhere(generated).tolist() == [[0, 1, 0], [1, 3, 1]]
