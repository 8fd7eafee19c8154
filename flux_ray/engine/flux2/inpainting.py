"""Drawing a part of a picture: what diffusers' inpainting does, and the rest put back at the end.

Flux2KleinInpaintPipeline noises the picture's latents to where the image is after each step, and
puts them in the place of tokens outside of the mask. It decodes these too, which is close to the
picture and not the picture: here its own pixels are put back there.
"""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from flux_ray.catalog.flops import TOKEN_SIDE
from flux_ray.engine.api import ImageState, InpaintInput
from flux_ray.engine.images import image_for
from flux_ray.request import Mask
from flux_ray.resizing import mask_image


def token_weights(mask: Mask, latents: Tensor) -> Tensor:
    """How far each of these tokens is drawn anew: as far as the mask marks its middle.

    Where it marks no token's middle, those that it touches are: no mask is without effect.
    """
    marks = torch.frombuffer(bytearray(mask.marks), dtype=torch.uint8)
    pixels = marks.view(1, 1, mask.height, mask.width).to(torch.float32) / 255
    size = (mask.height // TOKEN_SIDE, mask.width // TOKEN_SIDE)
    weights = functional.interpolate(pixels, size=size, mode="bilinear")
    if not weights.any():
        weights = functional.max_pool2d(pixels, TOKEN_SIDE)
    return weights.to(latents.device, latents.dtype).reshape(1, 1, -1).transpose(1, 2)


def keep_rest(state: ImageState, latents: Tensor) -> Tensor:
    """The latents after a step, with the picture's outside of the mask, as noisy as they are."""
    edit = state.conditioning.edit
    assert edit is not None and state.noise is not None, "no picture to keep anything of"
    sigma = state.sigmas[state.step + 1].to(latents.device, latents.dtype)
    kept = sigma * state.noise + (1.0 - sigma) * edit.latents
    return (1 - edit.weights) * kept + edit.weights * latents


def paste_rest(edit: InpaintInput, drawn: Image.Image) -> Image.Image:
    """What was drawn where the mask says so, and the picture's very pixels everywhere else."""
    return Image.composite(drawn, image_for(edit.picture), mask_image(edit.mask))
