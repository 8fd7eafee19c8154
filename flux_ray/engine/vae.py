"""What the families share around their VAEs: tiles, memory, and the pixels they return."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flux_ray.catalog import MAX_WHOLE_PIXELS
from flux_ray.request import RgbImage


@contextmanager
def tiles_above(vae: Any, width: int, height: int) -> Iterator[None]:
    """Let the VAE work in tiles if an image is above 1 MP; whole, 4 MP would take several GiB.

    Tiling is turned off again: the VAE also encodes references, and tiles change their latents.
    """
    vae.use_tiling = width * height > MAX_WHOLE_PIXELS
    try:
        yield
    finally:
        vae.use_tiling = False


def raster_of(pixels: Tensor) -> RgbImage:
    """Return pixels [3, height, width], floats from 0 to 1, as an image of 8 bits a channel.

    The result is what diffusers computes on the CPU, bit for bit: in fp32, halves rounded to even.
    Doing it on the device copies a quarter of the bytes and leaves the CPU nothing to compute.
    """
    eight_bit = pixels.permute(1, 2, 0).float().mul(255).round().to(torch.uint8)
    height, width, _ = eight_bit.shape
    return RgbImage(width, height, eight_bit.contiguous().cpu().numpy().tobytes())


def decode_bytes(config: Any, pixels: int, size: int) -> int:
    """Return the peak bytes of decoding an image; `size` is the bytes per number.

    They are three maps with the channels of the last upsampling. Above 1 MP the maps are those of
    one tile, and the image is held twice, as tiles and joined. Tests hold the estimates to within
    10 % of what the modules allocate on the meta device.
    """
    channels = (config.get("decoder_block_out_channels") or config["block_out_channels"])[1]
    whole = min(pixels, MAX_WHOLE_PIXELS)
    joined = 2 * 3 * pixels if pixels > whole else 0
    return int((3 * channels * whole + joined) * size)


def encode_bytes(config: Any, pixels: int, size: int) -> int:
    """Return the peak bytes of encoding one image: five maps with the first layer's channels.

    Images are encoded one by one, so that their number does not matter.
    """
    return int(5 * config["block_out_channels"][0] * pixels * size)
