"""The shapes of the published models, and any tier's modules on the meta device.

A plan is counted from these modules. A checkpoint in a local folder brings its own shapes; for one
that is not downloaded yet, the published shapes below are used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn
from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

from flux_ray.catalog import EMBEDDED, Tier
from flux_ray.engine.flux2.family import open_checkpoint
from flux_ray.engine.flux2.text_encoder import FAMILIES
from flux_ray.engine.loading import TextModel, first_layers, load_config, source_for, weights_of
from flux_ray.parallel.load import build_empty

Shape = dict[str, Any]

# From diffusers' conversion script and the config.json of the published checkpoints. Everything
# else has the default of Flux2Transformer2DModel and AutoencoderKLFlux2.
DEV_TRANSFORMER: Shape = {
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
}
KLEIN_9B_TRANSFORMER: Shape = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
KLEIN_4B_TRANSFORMER: Shape = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
MISTRAL_24B: Shape = {
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
QWEN3_8B: Shape = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN3_4B: Shape = QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728}


def mistral(num_layers: int) -> TextModel:
    """Return the first layers of dev's encoder, Mistral-Small-3.2-24B's language model."""
    return first_layers(MistralModel, MistralConfig(**MISTRAL_24B), num_layers)


def qwen3_8b(num_layers: int) -> TextModel:
    """Return the first layers of klein-9b's encoder."""
    return first_layers(Qwen3Model, Qwen3Config(**QWEN3_8B), num_layers)


def qwen3_4b(num_layers: int) -> TextModel:
    """Return the first layers of klein-4b's encoder."""
    return first_layers(Qwen3Model, Qwen3Config(**QWEN3_4B), num_layers)


Published = tuple[Shape, Callable[[int], TextModel]]
# The weights of pro and max are not public: they are planned as dev, whose size they have.
PUBLISHED: dict[str, Published] = {
    "flux-2-klein-4b": (KLEIN_4B_TRANSFORMER, qwen3_4b),
    "flux-2-klein-9b": (KLEIN_9B_TRANSFORMER, qwen3_8b),
    "flux-2-dev": (DEV_TRANSFORMER, mistral),
    "flux-2-pro": (DEV_TRANSFORMER, mistral),
    "flux-2-max": (DEV_TRANSFORMER, mistral),
}


@dataclass(frozen=True)
class EmptyModel:
    """A tier's modules on the meta device; `source` tells the user where the shapes are from."""

    transformer: Any
    text_model: TextModel
    text_encoder: Any
    vae: Any
    source: str


def empty_model(tier: Tier, weights: str | None) -> EmptyModel:
    """Build a tier's modules from the checkpoint's configs, or from the published shapes.

    The configs are used if `weights` is a local folder or the embedded checkpoint. The hub is never
    asked: a plan needs neither network nor licence. Raise ValueError if `weights` can be neither.
    """
    given = weights_of(tier, weights)
    family = FAMILIES[tier.family]
    num_layers = max(family.layers)
    if given == EMBEDDED or Path(given).is_dir():
        _, folder = open_checkpoint(family, given)
        text_model = family.text_model(folder / "text_encoder", num_layers)
        return assemble(
            load_config(folder / "transformer"),
            text_model,
            load_config(folder / "vae"),
            source=str(folder),
        )
    if tier.name not in PUBLISHED:
        raise ValueError(f"weights {given!r} of tier {tier.name}: no such folder here")
    # An absolute path may exist on the cluster and not here; anything else must be a hub id.
    if not Path(given).is_absolute():
        source_for(given)
    transformer, build_text_model = PUBLISHED[tier.name]
    return assemble(transformer, build_text_model(num_layers), {}, source="the published shapes")


def assemble(
    transformer: Mapping[str, Any], text_model: TextModel, vae: Mapping[str, Any], *, source: str
) -> EmptyModel:
    """Build all modules of a model on the meta device, from the configs of its parts."""

    def built(build: Callable[[], nn.Module]) -> nn.Module:
        return build_empty(build)

    return EmptyModel(
        built(lambda: Flux2Transformer2DModel.from_config(dict(transformer))),
        text_model,
        built(text_model.build),
        built(lambda: AutoencoderKLFlux2.from_config(dict(vae))),
        source,
    )
