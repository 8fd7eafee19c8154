"""What the engine remembers between its stages: a request's conditioning and an image's state."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompt and references of a request, shared by all of its images.

    Embeds and latents are [1, tokens, channels]; ids are [1, tokens, 4]. `warnings` are for the
    caller: what of the request was not heeded.
    """

    prompt_embeds: Tensor
    text_ids: Tensor
    reference_latents: Tensor | None = None
    reference_ids: Tensor | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Canvas:
    """The picture to draw: its size in pixels and the number of denoise steps."""

    width: int
    height: int
    num_steps: int


@dataclass(frozen=True)
class ImageState:
    """One image between two denoise steps.

    The schedule is the image's own: images of different sizes and step counts take turns on one
    transformer, and nothing that a step changes is shared. `sigmas` has one value more than
    `timesteps`: the end.
    """

    canvas: Canvas
    conditioning: Conditioning
    latents: Tensor
    latent_ids: Tensor
    timesteps: Tensor
    sigmas: Tensor
    step: int = 0

    @property
    def is_done(self) -> bool:
        """Whether every denoise step has been made."""
        return self.step == len(self.timesteps)
