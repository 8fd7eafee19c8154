"""The activation model: bytes that a stage of a request needs at its peak, besides the weights.

Counted in whole tensors that are alive at once in eager mode, with attention that does not keep its
scores; the tests hold it to within 10 % of what the modules allocate on the meta device.
"""

from dataclasses import dataclass
from typing import Any

from flux_ray.catalog import Tier
from flux_ray.config import Parallel
from flux_ray.engine.flux2 import MAX_WHOLE_PIXELS
from flux_ray.parallel.sequence import num_padded


@dataclass(frozen=True)
class Demand:
    """The size of a request: pixels of the picture, and its reference images."""

    pixels: int
    num_references: int


def largest_demand(tier: Tier) -> Demand:
    """The most that a client may ask of a tier."""
    return Demand(tier.max_pixels, tier.max_references)


def default_demand(tier: Tier) -> Demand:
    """What a client gets that does not say."""
    return Demand(tier.default_side**2, 0)


def num_image_tokens(vae: Any, tier: Tier, demand: Demand) -> int:
    """Of the picture and of its references, each as large as the model takes it."""
    side = 2 ** (len(vae.block_out_channels) - 1) * vae.patch_size[0]
    return (demand.pixels + demand.num_references * tier.max_reference_pixels) // side**2


def denoise_bytes(config: Any, num_text: int, num_image: int, parallel: Parallel, size: int) -> int:
    """One forward of the transformer, of which this rank has its part of tokens and channels.

    `size` is bytes a number. The unit is one [tokens, width]. A single block keeps 3 that every
    tensor rank has whole (residual, normalised, input), and split over them the fused projection
    (3 + 2 x mlp_ratio), query and key (2), the gated MLP (mlp_ratio) and both joined (mlp_ratio
    + 1). Ulysses keeps 14 beside the projection: query, key, stacked, sent and received ones (2 +
    3 x 3), and the answer on its way back (3). A double block keeps 8, all whole.
    """
    width = config.num_attention_heads * config.attention_head_dim
    ratio = config.mlp_ratio
    parts = parallel.sequence
    tokens = (num_padded(num_text, parts) + num_padded(num_image, parts)) // parts
    split = 6 + 4 * ratio if parts == 1 else max(6 + 4 * ratio, 17 + 2 * ratio)
    units = max(3 + split / parallel.tensor, 8)
    inputs = num_text * config.joint_attention_dim + num_image * config.in_channels
    return int((tokens * width * units + inputs) * size)


def decode_bytes(vae: Any, pixels: int, size: int) -> int:
    """Three maps of the last upsampling's channels; above a megapixel, of one tile."""
    channels = (vae.decoder_block_out_channels or vae.block_out_channels)[1]
    whole = min(pixels, MAX_WHOLE_PIXELS)
    joined = 2 * 3 * pixels if pixels > whole else 0
    return int((3 * channels * whole + joined) * size)


def encode_bytes(vae: Any, pixels: int, size: int) -> int:
    """Five maps of the first channels, for one reference: they are encoded one by one."""
    return int(5 * vae.block_out_channels[0] * pixels * size)


def prompt_bytes(config: Any, num_text: int, num_ranks: int, size: int) -> int:
    """The hidden states of all layers are kept to the end; the last MLP has three of its width."""
    kept = (config.num_hidden_layers + 2) * config.hidden_size
    return num_text * (kept + 3 * config.intermediate_size // num_ranks) * size


def held_bytes(config: Any, num_text: int, num_image: int, size: int) -> int:
    """What a request that waits for its next step holds: its prompt and latents."""
    return (num_text * config.joint_attention_dim + num_image * config.in_channels) * size
