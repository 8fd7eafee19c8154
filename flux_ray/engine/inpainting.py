"""Inpainting: generate what a mask marks, and keep the rest of an image.

The families share it: their latents differ, but all are [1, tokens, channels], row by row, and an
`InpaintInput` has `latents`, those of the image, and `weights`, how much of each token is new.

As in Flux2KleinInpaintPipeline, an image begins as the given one mixed with noise, and after each
step the tokens outside of the mask become the given image's again. On purpose it differs where that
pipeline loses something of the image or of the mask:

- The pipeline decodes the kept tokens, which gives nearly the image's pixels. Here the pixels
  outside of the mask are exactly the image's, pasted back at the end (`paste_rest`).
- It ignores a mask that marks no token's middle. Here every mask has an effect (`token_weights`).
- It scales an image above 1 MP down, and generates that size. Here the size is the caller's; only
  the reference that the transformer sees of the image is smaller.
- It refuses a `strength` so small that no step is left. Here the last step is always made.
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

    `latents` and the result are [1, tokens, channels].
    """
    edit = state.conditioning.edit
    assert edit is not None, "no image to keep anything of"
    kept = noised_image(state, state.step + 1)
    weights = edit.tensors["weights"]
    return (1 - weights) * kept + weights * latents


def noised_image(state: ImageState, step: int) -> Tensor:
    """Return the latents of the image to inpaint, mixed with the initial noise as before `step`.

    Clean ones would not fit their neighbours. They have the dtype of the noise.
    """
    edit, noise = state.conditioning.edit, state.noise
    assert edit is not None and noise is not None, "no image to inpaint"
    sigma = state.sigmas[step].to(noise.device, noise.dtype)
    return sigma * noise + (1.0 - sigma) * edit.tensors["latents"]


def paste_rest(edit: InpaintInput, generated: Image.Image) -> Image.Image:
    """Return the generated image inside of the mask, and the image's own pixels elsewhere."""
    return Image.composite(generated, image_for(edit.image), mask_image(edit.mask))
