"""The shapes of the published FLUX.1 models, and any tier's modules on the meta device.

The planner counts bytes from these modules. A checkpoint in a local folder brings its own shapes;
for one that is not downloaded yet, the published shapes below are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config

from flux_ray.catalog import ALL_EMBEDDED, Tier
from flux_ray.engine.api import Forward, TextModel
from flux_ray.engine.empty_model import EmptyParts
from flux_ray.engine.flux1 import activations
from flux_ray.engine.flux1.checkpoint import open_checkpoint
from flux_ray.engine.loading import load_config, t5, t5_of
from flux_ray.parallel.load import build_empty
from flux_ray.weights.source import source_for, weights_of

Shape = dict[str, Any]

# From the config.json of the published checkpoints. Everything else has the default of diffusers'
# and transformers' classes.
DEV: Shape = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
FILL: Shape = DEV | {"in_channels": 384, "out_channels": 64}
CONTROL: Shape = DEV | {"in_channels": 128, "out_channels": 64}
PUBLISHED: dict[str, Shape] = {
    "flux-1-dev": DEV,
    "flux-1-krea-dev": DEV,
    # Its weights are not public: it is planned as dev.
    "flux-1-pro": DEV,
    "flux-1-schnell": DEV | {"guidance_embeds": False},
    "flux-1-kontext-dev": DEV,
    "flux-1-fill-dev": FILL,
    "flux-1-depth-dev": CONTROL,
    "flux-1-canny-dev": CONTROL,
}
T5_XXL: Shape = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
CLIP_L: Shape = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
VAE: Shape = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    # The side of its tiles.
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass(frozen=True)
class EmptyFlux1(EmptyParts):
    """The EmptyModel of FLUX.1; `text_encoder` is T5, and every rank also holds CLIP whole."""

    def is_published(self, tier: Tier) -> bool:
        """Return whether the transformer has the shape that was published for the tier."""
        shape, config = PUBLISHED.get(tier.name), self.transformer.config
        return shape is not None and all(config[name] == value for name, value in shape.items())

    def denoise_bytes(self, forward: Forward) -> int:
        """Return the peak bytes of a forward on one rank."""
        return activations.denoise_bytes(self.transformer.config, forward)

    def held_bytes(self, num_text: int, num_image: int, size: int) -> int:
        """Return the bytes that a request holds while it waits for its next step."""
        return activations.held_bytes(self.transformer.config, num_text, num_image, size)

    def prompt_bytes(
        self, num_text: int, num_ranks: int, size: int, *, quantizes_activations: bool = False
    ) -> int:
        """Return the peak bytes of encoding one prompt on one of `num_ranks` ranks."""
        return activations.prompt_bytes(
            self.text_encoder.config,
            num_text,
            num_ranks,
            size,
            quantizes_activations=quantizes_activations,
        )


def empty_model(tier: Tier, weights: str | None) -> EmptyFlux1:
    """Build a tier's modules from the checkpoint's configs, or from the published shapes.

    The configs are used if `weights` is a local folder or the embedded checkpoint. The hub is never
    asked: a plan needs neither network nor licence. Raise ValueError if `weights` can be neither.
    """
    given = weights_of(tier, weights)
    if given in ALL_EMBEDDED or Path(given).is_dir():
        _, folder = open_checkpoint(tier, given)
        return assemble(
            load_config(folder / "transformer"),
            t5(folder / "text_encoder_2"),
            CLIPTextConfig.from_pretrained(folder / "text_encoder"),
            load_config(folder / "vae"),
            source=str(folder),
        )
    if tier.name not in PUBLISHED:
        raise ValueError(f"weights {given!r} of tier {tier.name}: no such folder here")
    # An absolute path may exist on the cluster and not here; anything else must be a hub id.
    if not Path(given).is_absolute():
        source_for(given)
    return assemble(
        PUBLISHED[tier.name],
        t5_of(T5Config(**T5_XXL)),
        CLIPTextConfig(**CLIP_L),
        VAE,
        source="the published shapes",
    )


def assemble(
    transformer: Mapping[str, Any],
    text_model: TextModel,
    clip: CLIPTextConfig,
    vae: Mapping[str, Any],
    *,
    source: str,
) -> EmptyFlux1:
    """Build all modules of a model on the meta device, from the configs of its parts."""
    return EmptyFlux1(
        build_empty(lambda: FluxTransformer2DModel.from_config(dict(transformer))),
        text_model,
        build_empty(text_model.build),
        build_empty(lambda: AutoencoderKL.from_config(dict(vae))),
        source,
        whole_text_encoder=build_empty(lambda: CLIPTextModel(clip)),
    )
