"""Inpainting: which tokens of an image a mask leaves as they are, and its pixels pasted back.

The families share it: their latents differ, but all are [1, tokens, channels], row by row, and an
`InpaintInput` has `latents`, those of the image, and `weights`, how much of each token is new.
"""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from flux_ray.catalog import TOKEN_SIDE
from flux_ray.engine.api import ImageState, InpaintInput
from flux_ray.engine.images import image_for
from flux_ray.request import Mask
from flux_ray.resizing import mask_image


def token_weights(mask: Mask, latents: Tensor) -> Tensor:
    """Return how much of each token is generated anew, [1, tokens, 1] from 0 to 1, like `latents`.

    The weight is the mask's value in the middle of the token. A mask so small that it marks no
    token's middle gives 1 to each token that it touches, so that every mask has an effect.
    """
    marks = torch.frombuffer(bytearray(mask.marks), dtype=torch.uint8)
    pixels = marks.view(1, 1, mask.height, mask.width).to(torch.float32) / 255
    size = (mask.height // TOKEN_SIDE, mask.width // TOKEN_SIDE)
    weights = functional.interpolate(pixels, size=size, mode="bilinear")
    if not weights.any():
        weights = functional.max_pool2d(pixels, TOKEN_SIDE)
    return weights.to(latents.device, latents.dtype).reshape(1, 1, -1).transpose(1, 2)


def keep_rest(state: ImageState, latents: Tensor) -> Tensor:
    """Return the latents after a step, with those of the image outside of the mask.

    `latents` and the result are [1, tokens, channels]. The image's latents are mixed with the
    initial noise to the noise level after this step; clean ones would not fit their neighbours.
    """
    edit = state.conditioning.edit
    assert edit is not None and state.noise is not None, "no image to keep anything of"
    sigma = state.sigmas[state.step + 1].to(latents.device, latents.dtype)
    kept = sigma * state.noise + (1.0 - sigma) * edit.tensors["latents"]
    weights = edit.tensors["weights"]
    return (1 - weights) * kept + weights * latents


def paste_rest(edit: InpaintInput, generated: Image.Image) -> Image.Image:
    """Return the generated image inside of the mask, and the image's own pixels elsewhere."""
    return Image.composite(generated, image_for(edit.image), mask_image(edit.mask))
