"""The shapes of the published FLUX.2 models, and any tier's modules on the meta device.

The planner counts bytes from these modules. A checkpoint in a local folder brings its own shapes;
for one that is not downloaded yet, the published shapes below are used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn
from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

from flux_ray.catalog import ALL_EMBEDDED, Tier
from flux_ray.engine.api import Forward, TextModel
from flux_ray.engine.empty_model import EmptyParts, decoder_prompt_bytes
from flux_ray.engine.flux2 import activations
from flux_ray.engine.flux2.checkpoint import open_checkpoint
from flux_ray.engine.flux2.text_encoder import KINDS
from flux_ray.engine.loading import first_layers, load_config
from flux_ray.parallel.load import build_empty
from flux_ray.weights.source import source_for, weights_of

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
    "flux-2-klein-4b-base": (KLEIN_4B_TRANSFORMER, qwen3_4b),
    "flux-2-klein-9b-base": (KLEIN_9B_TRANSFORMER, qwen3_8b),
    "flux-2-klein-9b-kv": (KLEIN_9B_TRANSFORMER, qwen3_8b),
    "flux-2-dev": (DEV_TRANSFORMER, mistral),
    "flux-2-pro": (DEV_TRANSFORMER, mistral),
    "flux-2-max": (DEV_TRANSFORMER, mistral),
}


@dataclass(frozen=True)
class EmptyFlux2(EmptyParts):
    """The EmptyModel of FLUX.2; `keeps_keys` if it keeps keys and values of references."""

    keeps_keys: bool = False

    def is_published(self, tier: Tier) -> bool:
        """Return whether the transformer has the shape that was published for the tier."""
        shape = PUBLISHED[tier.name][0] if tier.name in PUBLISHED else None
        config = self.transformer.config
        return shape is not None and all(config[name] == value for name, value in shape.items())

    def denoise_bytes(self, forward: Forward) -> int:
        """Return the peak bytes of a forward on one rank."""
        if self.keeps_keys:
            return activations.kept_denoise_bytes(self.transformer.config, forward)
        return activations.denoise_bytes(self.transformer.config, forward)

    def kept_bytes(self, forward: Forward) -> int:
        """Return the bytes of the references' keys and values, if it keeps them."""
        return activations.kept_bytes(self.transformer.config, forward) if self.keeps_keys else 0

    def held_bytes(self, num_text: int, num_image: int, size: int) -> int:
        """Return the bytes that a request holds while it waits for its next step."""
        return activations.held_bytes(self.transformer.config, num_text, num_image, size)

    def prompt_bytes(
        self, num_text: int, num_ranks: int, size: int, *, quantizes_activations: bool = False
    ) -> int:
        """Return the peak bytes of encoding one prompt on one of `num_ranks` ranks."""
        return decoder_prompt_bytes(
            self.text_encoder.config,
            num_text,
            num_ranks,
            size,
            quantizes_activations=quantizes_activations,
        )


def empty_model(tier: Tier, weights: str | None) -> EmptyFlux2:
    """Build a tier's modules from the checkpoint's configs, or from the published shapes.

    The configs are used if `weights` is a local folder or the embedded checkpoint. The hub is never
    asked: a plan needs neither network nor licence. Raise ValueError if `weights` can be neither.
    """
    given = weights_of(tier, weights)
    kind = KINDS[tier.family]
    num_layers = max(kind.layers)
    if given in ALL_EMBEDDED or Path(given).is_dir():
        _, folder = open_checkpoint(kind, given)
        text_model = kind.text_model(folder / "text_encoder", num_layers)
        return assemble(
            load_config(folder / "transformer"),
            text_model,
            load_config(folder / "vae"),
            source=str(folder),
            keeps_keys=kind.keeps_keys,
        )
    if tier.name not in PUBLISHED:
        raise ValueError(f"weights {given!r} of tier {tier.name}: no such folder here")
    # An absolute path may exist on the cluster and not here; anything else must be a hub id.
    if not Path(given).is_absolute():
        source_for(given)
    transformer, build_text_model = PUBLISHED[tier.name]
    return assemble(
        transformer,
        build_text_model(num_layers),
        {},
        source="the published shapes",
        keeps_keys=kind.keeps_keys,
    )


def assemble(
    transformer: Mapping[str, Any],
    text_model: TextModel,
    vae: Mapping[str, Any],
    *,
    source: str,
    keeps_keys: bool = False,
) -> EmptyFlux2:
    """Build all modules of a model on the meta device, from the configs of its parts."""

    def built(build: Callable[[], nn.Module]) -> nn.Module:
        return build_empty(build)

    return EmptyFlux2(
        built(lambda: Flux2Transformer2DModel.from_config(dict(transformer))),
        text_model,
        built(text_model.build),
        built(lambda: AutoencoderKLFlux2.from_config(dict(vae))),
        source,
        keeps_keys=keeps_keys,
    )
