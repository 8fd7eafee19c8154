"""A model's pixels as eight bits a channel, made on its own device."""

import torch
from torch import Tensor

from flux_ray.request import RgbImage


def raster_of(pixels: Tensor) -> RgbImage:
    """Return the raster of pixels [3, height, width] from 0 to 1.

    To the bit what diffusers makes of them on the CPU: in float32, and halves go to the even one.
    A quarter of the bytes leaves the device, and the CPU has nothing to compute.
    """
    eight_bit = pixels.permute(1, 2, 0).float().mul(255).round().to(torch.uint8)
    height, width, _ = eight_bit.shape
    return RgbImage(width, height, eight_bit.contiguous().cpu().numpy().tobytes())
