"""What a model family is to everything else: the stages it implements, and their values.

A request is encoded once into a `Conditioning`; each of its images is an `ImageState` that every
denoise step replaces. All values are frozen, because the images of one request share them. A family
is a folder beside this file, and tells its `FamilySpec` to `registry.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from flux_ray.catalog import Tier
from flux_ray.config import Lora, Parallel, Quantization
from flux_ray.parallel.mesh import Mesh
from flux_ray.request import Mask, RgbImage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PromptEmbeds:
    """A prompt as the transformer takes it, in tensors that each family names for itself.

    `warnings` tell the caller which part of the prompt was ignored.
    """

    tensors: Mapping[str, Tensor]
    warnings: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Return how many bytes the tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class InpaintInput:
    """The image to inpaint and its mask, both scaled to the size that is generated.

    `tensors`: what the model takes of them, by names of the family.
    """

    image: RgbImage
    mask: Mask
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompt and references of a request, shared by all of its images.

    `references`: the encoded references in tensors that each family names for itself, or empty.
    `edit` is set if the request has a mask; the first reference is then the image to inpaint.
    `negative` is set if each step shall steer away from it.
    """

    prompt: PromptEmbeds
    references: Mapping[str, Tensor] = field(default_factory=dict)
    edit: InpaintInput | None = None
    negative: PromptEmbeds | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return sentences for the caller about parts of the request that were ignored."""
        negative = () if self.negative is None else self.negative.warnings
        return (*self.prompt.warnings, *(f"negative prompt: {each}" for each in negative))


@dataclass(frozen=True)
class ImageSpec:
    """The image to generate: its size in pixels, the number of denoise steps, and the guidance.

    Only models that were distilled with guidance use `guidance`; others ignore it. `has_previews`
    makes each step keep its velocity, without which `preview` cannot work. `true_cfg_scale`: how
    far each step goes away from the conditioning's negative prompt, if it has one. `strength`: the
    share of noise that an image to inpaint starts with, above 0 and up to 1.
    """

    width: int
    height: int
    num_steps: int
    guidance: float = 1.0
    has_previews: bool = False
    true_cfg_scale: float = 1.0
    strength: float = 1.0


@dataclass(frozen=True)
class ImageState:
    """One image between two denoise steps.

    Each image has its own schedule, because images of different sizes and step counts take turns on
    one transformer; nothing that a step changes is shared between images.

    `latents`: [1, tokens, channels] in the model's dtype. `timesteps`: fp32 [num_steps]; `sigmas`:
    fp32 [num_steps + 1], the last one is the end, 0. `fixed`: the transformer's inputs that stay
    the same for all steps, by names of the family. `step` counts the steps that are done. `noise`:
    the initial latents, kept only for inpainting. `velocity`: what the last step predicted, like
    `latents`; None before the first step, and always None if there are no previews.
    """

    canvas: ImageSpec
    conditioning: Conditioning
    latents: Tensor
    timesteps: Tensor
    sigmas: Tensor
    fixed: Mapping[str, Tensor]
    step: int = 0
    noise: Tensor | None = None
    velocity: Tensor | None = None

    @property
    def is_done(self) -> bool:
        """Return whether all denoise steps are done and the image can be decoded."""
        return self.step == len(self.timesteps)


@dataclass(frozen=True)
class Placement:
    """How and where one rank holds the weights: the tier's args that the engine needs, and a mesh.

    `mesh` is the rank's place among the ranks that share the model. `quantization` concerns the
    transformer, `encoder_quantization` the text encoder.
    """

    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    mesh: Mesh = field(default_factory=Mesh)
    quantization: Quantization | None = None
    encoder_quantization: Quantization | None = None
    loras: tuple[Lora, ...] = ()
    text_encoder: Literal["colocated", "shared"] = "colocated"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the torch dtype of activations, and of weights that are not quantized."""
        return DTYPES[self.dtype]


class PromptEncoder(Protocol):
    """A loaded text encoder; if it is split, all its ranks encode the same prompts in one order."""

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """Encode a prompt, padded or cut to the tier's text length."""


class Adapter(PromptEncoder, Protocol):
    """One loaded model, or one rank's part of it; a rank calls its stages from one thread.

    Stages share only the values that they take and return, so that the steps of several images can
    take turns. `encode_prompt` and `denoise`, and `encode` of some families, exchange tensors with
    the replica's other ranks, so all of them must call the same stages in the same order.
    """

    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """Encode a prompt; not available if the tier has a shared text encoder."""

    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """Encode the references, and join them with the prompt, once for all images of a request.

        Raise BadReference if a reference has a size that the model cannot take.
        """

    def edit(self, given: Conditioning, image: RgbImage, mask: Mask) -> Conditioning:
        """Return `given` extended by the image to inpaint and its mask.

        `image` is the first reference, scaled to the size that is generated, and so is `mask`.
        """

    def prepare(self, conditioning: Conditioning, canvas: ImageSpec, seed: int) -> ImageState:
        """Return an image of pure noise with its schedule.

        The noise comes from a CPU generator: the same seed gives the same image on every device.
        """

    def denoise(self, state: ImageState) -> ImageState:
        """Return the state after one more denoise step; all ranks of a replica step together."""

    def preview(self, state: ImageState) -> RgbImage:
        """Return an estimate of the finished pixels from an unfinished image; needs one rank."""

    def decode(self, state: ImageState) -> RgbImage:
        """Return the pixels of a finished image; needs only one rank."""


@dataclass(frozen=True)
class Forward:
    """One forward of the transformer, as far as its memory depends on it.

    `num_text` and `num_image` count the tokens of the whole request, before they are split over
    ranks; `num_reference` of the latter are those of references. `size` is the bytes per number.
    `quantizes_activations`: products are made on FP8 units.
    """

    num_text: int
    num_image: int
    parallel: Parallel
    size: int
    quantizes_activations: bool = False
    num_reference: int = 0


@dataclass(frozen=True)
class TextModel:
    """How to build and split a text model, before its weights are loaded.

    `plan`: the tensor-parallel style of each parameter, as in transformers. `num_heads`: how many
    heads can be spread over ranks; with grouped queries, the heads of keys and values. `embedding`:
    the parameter by whose name the prefix of the checkpoint's names is found. `folder`: the
    checkpoint's component.
    """

    build: Callable[[], nn.Module]
    plan: Mapping[str, Any]
    num_heads: int
    embedding: str = "embed_tokens.weight"
    folder: str = "text_encoder"


class EmptyModel(Protocol):
    """A tier's modules on the meta device, from which the planner counts bytes.

    `whole_text_encoder`: a second text encoder that every rank holds whole, or None. `source` tells
    the user where the shapes are from. The methods return the peak bytes of a stage besides the
    weights, in eager mode on a device without libraries of its own; `size` is the bytes per number.
    """

    @property
    def transformer(self) -> Any: ...
    @property
    def text_model(self) -> TextModel: ...
    @property
    def text_encoder(self) -> Any: ...
    @property
    def whole_text_encoder(self) -> Any: ...
    @property
    def vae(self) -> Any: ...
    @property
    def source(self) -> str: ...

    def is_published(self, tier: Tier) -> bool:
        """Return whether the transformer has the shape that was published for the tier."""

    def num_tokens(self, pixels: int) -> int:
        """Return the image tokens of so many pixels."""

    def denoise_bytes(self, forward: Forward) -> int:
        """Return the peak of a forward of the transformer on one rank."""

    def kept_bytes(self, forward: Forward) -> int:
        """Return what a rank keeps of a request until its image is decoded, steps included.

        `denoise_bytes` has it too.
        """

    def held_bytes(self, num_text: int, num_image: int, size: int) -> int:
        """Return what a request holds while it waits for its next step: prompt and latents."""

    def decode_bytes(self, pixels: int, size: int) -> int:
        """Return the peak of decoding an image."""

    def encode_bytes(self, pixels: int, size: int) -> int:
        """Return the peak of encoding one reference."""

    def prompt_bytes(
        self, num_text: int, num_ranks: int, size: int, *, quantizes_activations: bool = False
    ) -> int:
        """Return the peak of encoding one prompt on one of `num_ranks` ranks."""


@dataclass(frozen=True)
class FamilySpec:
    """A model family, as the rest of the engine and the planner see it.

    `load` loads an adapter from a checkpoint, `load_prompt_encoder` only its text encoder, for a
    process that the tier's replicas share; `empty_model` builds a tier's modules without weights.
    They raise ValueError if the weights do not fit the tier. `heeds`: the fields of a request that
    change the image, besides prompt, size, steps and seed; the family's tiers offer no others.
    `is_for_one_gpu`: more replicas of it are better than more ranks, so it is planned on one GPU.
    """

    load: Callable[[str, Placement, Tier], Adapter]
    load_prompt_encoder: Callable[[str, Placement, Tier], PromptEncoder]
    empty_model: Callable[[Tier, str | None], EmptyModel]
    heeds: frozenset[str]
    is_for_one_gpu: bool = False
