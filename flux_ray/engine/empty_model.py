"""What the families' models without weights have in common: their parts, and the VAE's bytes."""

from dataclasses import dataclass
from typing import Any

from flux_ray.engine.api import Forward, TextModel
from flux_ray.engine.vae import decode_bytes, encode_bytes

# FLUX.1's VAE does not say how many latents a side make a token.
PATCHES = (2, 2)


@dataclass(frozen=True)
class EmptyParts:
    """The parts of an EmptyModel, and what does not depend on the family's transformer."""

    transformer: Any
    text_model: TextModel
    text_encoder: Any
    vae: Any
    source: str
    whole_text_encoder: Any = None

    def num_tokens(self, pixels: int) -> int:
        """Return the image tokens of so many pixels, by the VAE's own factor and patches."""
        config = self.vae.config
        side = 2 ** (len(config.block_out_channels) - 1) * config.get("patch_size", PATCHES)[0]
        return pixels // int(side) ** 2

    def kept_bytes(self, forward: Forward) -> int:
        """Return 0: most families compute nothing of a request that they keep for all its steps."""
        return 0

    def decode_bytes(self, pixels: int, size: int) -> int:
        """Return the peak bytes of decoding an image."""
        return decode_bytes(self.vae.config, pixels, size)

    def encode_bytes(self, pixels: int, size: int) -> int:
        """Return the peak bytes of encoding one reference."""
        return encode_bytes(self.vae.config, pixels, size)


def decoder_prompt_bytes(
    config: Any, num_text: int, num_ranks: int, size: int, *, quantizes_activations: bool = False
) -> int:
    """Return the peak bytes of encoding one prompt on one of `num_ranks` ranks of a decoder.

    The hidden states of all layers are kept to the end, and the last MLP holds three tensors of its
    inner width. If torchao quantizes activations, the MLP's last product holds 1 + 6.5 instead.
    """
    kept = (config.num_hidden_layers + 2) * config.hidden_size
    units = 1 + 6.5 if quantizes_activations else 3
    inner = units * config.intermediate_size / num_ranks
    # 1 % more for ids, cosines and sines, as measured.
    return int(1.01 * num_text * (kept + inner) * size)
