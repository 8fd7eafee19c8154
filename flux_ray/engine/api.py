"""The values that pass between the stages of the engine, for every model family.

A request is encoded once into a `Conditioning`; each of its images is an `ImageState` that every
denoise step replaces. All values are frozen, because the images of one request share them.
"""

from dataclasses import dataclass

from torch import Tensor

from flux_ray.request import Mask, RgbImage


@dataclass(frozen=True)
class PromptEmbeds:
    """A prompt as the transformer takes it.

    `embeds`: [1, tokens, channels] in the model's dtype. `text_ids`: int64 [1, tokens, 4], the
    positions. `warnings` tell the caller which part of the prompt was ignored.
    """

    embeds: Tensor
    text_ids: Tensor
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class InpaintInput:
    """The image to inpaint and its mask, both scaled to the size that is generated.

    `latents`: the image, encoded, [1, tokens, channels]. `weights`: [1, tokens, 1], 1 where a token
    is generated anew and 0 where it is kept. Both have the VAE's dtype.
    """

    image: RgbImage
    mask: Mask
    latents: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompt and references of a request, shared by all of its images.

    `reference_latents`: [1, tokens, channels] in the VAE's dtype, all references one after the
    other; `reference_ids`: int64 [1, tokens, 4]; both None without references. `edit` is set if the
    request has a mask; the first reference is then the image to inpaint.
    """

    prompt: PromptEmbeds
    reference_latents: Tensor | None = None
    reference_ids: Tensor | None = None
    edit: InpaintInput | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return sentences for the caller about parts of the request that were ignored."""
        return self.prompt.warnings


@dataclass(frozen=True)
class ImageSpec:
    """The image to generate: its size in pixels, the number of denoise steps, and the guidance.

    Only models that were distilled with guidance use `guidance`; others ignore it. `has_previews`
    makes each step keep its velocity, without which `preview` cannot work.
    """

    width: int
    height: int
    num_steps: int
    guidance: float = 1.0
    has_previews: bool = False


@dataclass(frozen=True)
class StepInputs:
    """The transformer's inputs that stay the same for all steps of one image.

    `text_rotary` and `image_rotary`: fp32 [1, tokens, 2 x head_dim], the rotary tables of the text
    and of the image with its references, computed by the family's adapter. `guidance`: fp32 [1].
    """

    text_rotary: Tensor
    image_rotary: Tensor
    guidance: Tensor


@dataclass(frozen=True)
class ImageState:
    """One image between two denoise steps.

    Each image has its own schedule, because images of different sizes and step counts take turns on
    one transformer; nothing that a step changes is shared between images.

    `latents`: [1, tokens, channels] in the model's dtype; `latent_ids`: int64 [1, tokens, 4].
    `timesteps`: fp32 [num_steps]; `sigmas`: fp32 [num_steps + 1], the last one is the end, 0.
    `step` counts the steps that are done. `noise`: the initial latents, kept only for inpainting.
    `velocity`: what the last step predicted, like `latents`; None before the first step, and always
    None if there are no previews.
    """

    canvas: ImageSpec
    conditioning: Conditioning
    latents: Tensor
    latent_ids: Tensor
    timesteps: Tensor
    sigmas: Tensor
    fixed: StepInputs
    step: int = 0
    noise: Tensor | None = None
    velocity: Tensor | None = None

    @property
    def is_done(self) -> bool:
        """Return whether all denoise steps are done and the image can be decoded."""
        return self.step == len(self.timesteps)
