"""What the engine remembers between its stages: a request's conditioning and an image's state."""

from dataclasses import dataclass

from torch import Tensor

from flux_ray.request import Mask, RgbImage


@dataclass(frozen=True)
class PromptEmbeds:
    """A prompt as the transformer takes it: [1, tokens, channels], and ids [1, tokens, 4].

    `warnings` are for the caller: what of the prompt was not heeded.
    """

    embeds: Tensor
    text_ids: Tensor
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class InpaintInput:
    """An image of which a part is drawn anew, and the mask of that part, in the size drawn.

    `latents` are the image's, [1, tokens, channels]; `weights`, [1, tokens, 1], are 1 where a
    token is drawn anew, 0 where it stays.
    """

    image: RgbImage
    mask: Mask
    latents: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompt and references of a request, shared by all of its images.

    Latents are [1, tokens, channels], ids [1, tokens, 4]; None without references. With an `edit`,
    the first of them is its image.
    """

    prompt: PromptEmbeds
    reference_latents: Tensor | None = None
    reference_ids: Tensor | None = None
    edit: InpaintInput | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the request was not heeded."""
        return self.prompt.warnings


@dataclass(frozen=True)
class ImageSpec:
    """The image to draw: its size in pixels, the number of denoise steps, and the guidance.

    Only a model that was distilled with guidance heeds that. `has_previews`: its states can be
    previewed.
    """

    width: int
    height: int
    num_steps: int
    guidance: float = 1.0
    has_previews: bool = False


@dataclass(frozen=True)
class StepInputs:
    """What the transformer is given alike at every step of one image, and lives as long as it.

    Rotary tables of the text and of the image with its references, [1, tokens, 2 x head_dim] in
    fp32, made by `rotary.TableEmbedder`; the guidance, [1].
    """

    text_rotary: Tensor
    image_rotary: Tensor
    guidance: Tensor


@dataclass(frozen=True)
class ImageState:
    """One image between two denoise steps.

    The schedule is the image's own: images of different sizes and step counts take turns on one
    transformer, and nothing that a step changes is shared. `sigmas` has one value more than
    `timesteps`: the end. `noise` is what an image under a mask began as, `velocity` the last
    step's, where there are previews.
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
        """Whether every denoise step has been made."""
        return self.step == len(self.timesteps)
