"""The models to measure: klein-4b and dev in real size, or small ones, loaded by our own code."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3Model

from flux_ray.catalog.tiers import Tier, tier_for
from flux_ray.config.tier import Quantization, TierArgs
from flux_ray.engine.api import (
    Conditioning,
    ImageSpec,
    ImageState,
    Placement,
    PromptEmbeds,
    TextModel,
)
from flux_ray.engine.flux2.empty_model import (
    DEV_TRANSFORMER,
    KLEIN_4B_TRANSFORMER,
    EmptyFlux2,
    Shape,
    assemble,
    mistral,
    qwen3_4b,
)
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.flux2.text_encoder import KINDS
from flux_ray.engine.loading import first_layers, load_config
from flux_ray.parallel.load import LoadSpec, load_sharded
from flux_ray.parallel.mesh import Axis
from flux_ray.planner.candidate import Candidate
from flux_ray.tiny import KLEIN_CHECKPOINT
from tests.bench.gpu_checkpoints import MadeWeights
from tests.bench.gpu_gauges import Device

SEED = 7
PROMPT = "a red circle on a blue background"
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Subject:
    """A model to measure: its shapes, and the tier that says how large an image is."""

    tier: Tier
    transformer: Shape
    text_model: Callable[[int], TextModel]
    vae: Shape

    @cached_property
    def empty(self) -> EmptyFlux2:
        """Return its modules without weights."""
        text_model = self.text_model(max(KINDS[self.tier.family].layers))
        return assemble(self.transformer, text_model, self.vae, source="the bench")

    @property
    def canvas(self) -> ImageSpec:
        """Return the image that a client gets who leaves size and steps out."""
        tier = self.tier
        return ImageSpec(tier.default_side, tier.default_side, tier.num_steps, tier.guidance)

    def shallower(self, num_single_layers: int) -> "Subject":
        """Return the same model with fewer single blocks."""
        shape = self.transformer | {"num_single_layers": num_single_layers}
        return replace(self, transformer=shape)

    def candidate(self, device: Device, **args: Any) -> Candidate:
        """Return what a plan says of it on this GPU, for one request at a time as here."""
        fields = {"tier": self.tier.name, "weights": "made", "max_ongoing_requests": 1}
        return Candidate(self.empty, self.tier, TierArgs(**fields, **args), device.card)


@dataclass(frozen=True)
class Scale:
    """The size of the bench: the real models, or small ones that a CPU can run."""

    name: str
    klein: Subject
    dev: Subject
    num_rounds: int
    max_file_bytes: int


REAL = Scale(
    "real",
    Subject(tier_for("flux-2-klein-4b"), KLEIN_4B_TRANSFORMER, qwen3_4b, {}),
    Subject(tier_for("flux-2-dev"), DEV_TRANSFORMER, mistral, {}),
    num_rounds=9,
    max_file_bytes=2 * 10**9,
)


def small_text_model(num_layers: int) -> TextModel:
    """Return a text model as wide as the embedded one, with its tokenizer."""
    config = Qwen3Config(
        vocab_size=448,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return first_layers(Qwen3Model, config, num_layers)


def small(tier_name: str, *, guidance_embeds: bool) -> Subject:
    """Return a model of the embedded one's size, with enough heads for eight ranks."""
    shape = load_config(KLEIN_CHECKPOINT / "transformer") | {
        "num_layers": 1,
        "num_single_layers": 3,
        "num_attention_heads": 8,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": guidance_embeds,
    }
    tier = replace(tier_for(tier_name), default_side=128, text_length=48)
    return Subject(tier, shape, small_text_model, load_config(KLEIN_CHECKPOINT / "vae"))


SMALL = Scale(
    "small",
    small("flux-2-klein-4b", guidance_embeds=False),
    small("flux-2-dev", guidance_embeds=True),
    num_rounds=3,
    max_file_bytes=10**6,
)


def load_klein(
    subject: Subject, folder: Path, quantization: Quantization | None, device: Device
) -> Flux2:
    """Load the whole pipeline as a rank does."""
    placement = Placement(
        "bfloat16", device.kind, quantization=quantization, encoder_quantization=quantization
    )
    return Flux2.load(str(folder), placement, subject.tier)


def load_dev(
    subject: Subject, tensor: int, quantization: Quantization | None, device: Device
) -> Flux2:
    """Load rank 0 of `tensor` ranks: its part of the transformer, and the VAE.

    Weights are made as they are read. As the other ranks are not there, collectives must do
    nothing.
    """
    model_class = Flux2Transformer2DModel
    recipe = LoadSpec(
        MadeWeights(subject.empty.transformer, device.kind),
        Axis(0, tensor),
        BF16,
        device.kind,
        quantization=quantization,
    )
    transformer = load_sharded(
        lambda: model_class.from_config(subject.transformer), model_class._tp_plan, recipe
    )
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(KLEIN_CHECKPOINT / "scheduler"),
        vae=AutoencoderKLFlux2.from_config(subject.vae).to(device.kind, BF16).eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    return Flux2(pipeline, None, subject.tier)


def random_prompt(subject: Subject, device: Device) -> PromptEmbeds:
    """Return random embeddings of the shape that the text encoder returns."""
    width = subject.empty.transformer.config.joint_attention_dim
    dice = torch.Generator().manual_seed(SEED)
    embeds = torch.randn(1, subject.tier.text_length, width, generator=dice)
    text_ids = Flux2Pipeline._prepare_text_ids(embeds)
    tensors = {"embeds": embeds.to(device.kind, BF16), "text_ids": text_ids.to(device.kind)}
    return PromptEmbeds(tensors)


def start(adapter: Flux2, subject: Subject, prompt: PromptEmbeds) -> ImageState:
    """Return the image before its first step."""
    return adapter.prepare(Conditioning(prompt), subject.canvas, SEED)


def generate(adapter: Flux2, subject: Subject) -> None:
    """Generate a whole image, from prompt to pixels."""
    state = start(adapter, subject, adapter.encode_prompt(PROMPT))
    while not state.is_done:
        state = adapter.denoise(state)
    adapter.decode(state)
