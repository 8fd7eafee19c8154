"""The shapes of the published FLUX.3 models, and any tier's modules on the meta device.

The planner counts bytes from these modules. A checkpoint in a local folder brings its own shapes;
for one that is not downloaded yet, the published shapes below are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLFlux2
from transformers import Qwen3VLTextConfig

from flux_ray.catalog import Tier
from flux_ray.engine.api import Forward, TextModel
from flux_ray.engine.empty_model import EmptyParts, decoder_prompt_bytes
from flux_ray.engine.flux3 import activations
from flux_ray.engine.flux3.checkpoint import KINDS, open_checkpoint
from flux_ray.engine.flux3.text_encoder import language_model, qwen3_vl
from flux_ray.engine.flux3.transformer import Flux3Transformer, check_sequence
from flux_ray.engine.loading import load_config
from flux_ray.parallel.load import build_empty
from flux_ray.weights.source import source_for, weights_of

# Everything else has the default of Flux3Transformer2DModel and AutoencoderKLFlux2.
BASE_TRANSFORMER: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 28,
    "num_attention_heads": 24,
    "joint_attention_dim": 20480,
    "flow_map": False,
}
PUBLISHED = {
    "flux-3-klein": BASE_TRANSFORMER | {"flow_map": True},
    "flux-3-klein-base": BASE_TRANSFORMER,
}
# Qwen3-VL-4B-Instruct. Its positions of text are those of Qwen3: rows and columns are of images.
QWEN3_VL_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000000.0,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}


@dataclass(frozen=True)
class EmptyFlux3(EmptyParts):
    """The EmptyModel of FLUX.3."""

    def is_published(self, tier: Tier) -> bool:
        """Return whether the transformer has the shape that was published for the tier."""
        config = self.transformer.config
        return all(config[name] == value for name, value in PUBLISHED[tier.name].items())

    def denoise_bytes(self, forward: Forward) -> int:
        """Return the peak bytes of a forward on one rank; raise ValueError for sequence ranks."""
        check_sequence(forward.parallel.sequence)
        return activations.denoise_bytes(self.transformer.config, forward)

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


def empty_model(tier: Tier, weights: str | None) -> EmptyFlux3:
    """Build a tier's modules from the checkpoint's configs, or from the published shapes.

    The configs are used if `weights` is a local folder. The hub is never asked: a plan needs
    neither network nor licence. Raise ValueError if `weights` can be neither.
    """
    given = weights_of(tier, weights)
    if Path(given).is_dir():
        _, folder = open_checkpoint(KINDS[tier.family], given)
        text_model = qwen3_vl(folder / "text_encoder")
        return assemble(
            load_config(folder / "transformer"),
            load_config(folder / "vae"),
            text_model,
            source=str(folder),
        )
    # An absolute path may exist on the cluster and not here; anything else must be a hub id.
    if not Path(given).is_absolute():
        source_for(given)
    text_model = language_model(Qwen3VLTextConfig(**QWEN3_VL_4B))
    return assemble(PUBLISHED[tier.name], {}, text_model, source="the published shapes")


def assemble(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], text_model: TextModel, *, source: str
) -> EmptyFlux3:
    """Build all modules of a model on the meta device, from the configs of its parts."""
    return EmptyFlux3(
        build_empty(lambda: Flux3Transformer.from_config(dict(transformer))),
        text_model,
        build_empty(text_model.build),
        build_empty(lambda: AutoencoderKLFlux2.from_config(dict(vae))),
        source,
    )
