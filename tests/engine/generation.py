"""The same image drawn by a diffusers pipeline and by an adapter, and what to draw it from."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux_ray.engine.api import ImageSpec, ImageState
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.images import image_for, raster_for
from flux_ray.request import Mask, RgbImage

SEED = 7


def reference(width: int, height: int, seed: int) -> RgbImage:
    """An image with something everywhere, so that a pixel's shift would show."""
    pixels = random.Random(seed).randbytes(8 * 8 * 3)
    return raster_for(Image.frombytes("RGB", (8, 8), pixels).resize((width, height)))


def generate_with_pipeline(
    pipeline: DiffusionPipeline,
    prompt: str,
    canvas: ImageSpec,
    references: tuple[RgbImage, ...],
    **options: Any,
) -> tuple[Tensor, RgbImage]:
    """The last latents and the image; an option that is None is not given to the pipeline."""
    last: dict[str, Tensor] = {}

    def remember(_: object, step: int, timestep: object, tensors: dict) -> dict:
        last.update(tensors)
        return {}

    options = {"guidance_scale": canvas.guidance} | options
    images = pipeline(
        prompt=prompt,
        image=[image_for(raster) for raster in references] or None,
        width=canvas.width,
        height=canvas.height,
        num_inference_steps=canvas.num_steps,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=remember,
        **{name: option for name, option in options.items() if option is not None},
    ).images
    return last["latents"], raster_for(images[0])


def finish(adapter: Flux2, state: ImageState) -> ImageState:
    while not state.is_done:
        state = adapter.denoise(state)
    return state


def generate(
    adapter: Flux2,
    prompt: str,
    canvas: ImageSpec,
    references: tuple[RgbImage, ...],
    mask: Mask | None = None,
    negative: str | None = None,
) -> tuple[Tensor, RgbImage]:
    """The last latents and the image; a mask is of the first reference."""
    conditioning = adapter.encode(adapter.encode_prompt(prompt), references)
    if negative is not None:
        conditioning = replace(conditioning, negative=adapter.encode_prompt(negative))
    if mask is not None:
        conditioning = adapter.edit(conditioning, references[0], mask)
    state = finish(adapter, adapter.prepare(conditioning, canvas, SEED))
    return state.latents, adapter.decode(state)


def save_lora(file: Path, width: int = 64) -> None:
    """An adapter of rank 2 for a layer of each kind in the small transformers, as trainers save."""
    dice = torch.Generator().manual_seed(3)
    sizes = {
        "transformer_blocks.0.attn.to_q": (width, width),
        "single_transformer_blocks.1.attn.to_out": (width, 4 * width),
    }
    tensors = {}
    for name, (num_out, num_in) in sizes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, num_in, generator=dice)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(num_out, 2, generator=dice)
    save_file(tensors, file)
