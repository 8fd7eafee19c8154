"""The activation model: bytes that a stage of a request needs at its peak, besides the weights.

Counted in whole tensors that are alive at once in eager mode, with attention that does not keep its
scores; the tests hold it to within 10 % of what the modules allocate on the meta device. What
CUDA's libraries allocate besides was measured (tests/bench/results) and is counted apart.
"""

from dataclasses import dataclass
from typing import Any

from flux_ray.catalog.flops import MAX_WHOLE_PIXELS
from flux_ray.catalog.tiers import Tier
from flux_ray.config.tier import Parallel
from flux_ray.parallel.sequence import num_padded

# What a stage of the VAE takes on a card, of what its modules allocate themselves: convolutions in
# bf16 copy what goes in and comes out to channels last. Decoding a megapixel in klein-4b measured
# 2.553 GB on an H100 where the modules have 1.611, which is 1.585; encoding is taken as decoding.
CARD_CONVOLUTIONS = 1.6
FP32 = 4


@dataclass(frozen=True)
class ActivationDemand:
    """The size of a request: pixels of the image, and its reference images."""

    pixels: int
    num_references: int


def largest_demand(tier: Tier) -> ActivationDemand:
    """The most that a client may ask of a tier."""
    return ActivationDemand(tier.max_pixels, tier.max_references)


def default_demand(tier: Tier) -> ActivationDemand:
    """What a client gets that does not say."""
    return ActivationDemand(tier.default_side**2, 0)


def num_image_tokens(vae: Any, tier: Tier, demand: ActivationDemand) -> int:
    """Of the image and of its references, each as large as the model takes it."""
    side = 2 ** (len(vae.block_out_channels) - 1) * vae.patch_size[0]
    pixels = demand.pixels + demand.num_references * tier.max_reference_pixels
    return pixels // int(side) ** 2


@dataclass(frozen=True)
class Forward:
    """One forward of the transformer on one rank: tokens of text and image, bytes a number.

    `quantizes_activations`: FP8 products on FP8 units.
    """

    num_text: int
    num_image: int
    parallel: Parallel
    size: int
    quantizes_activations: bool = False


def denoise_bytes(config: Any, forward: Forward) -> int:
    """The peak of a forward, in units of one [this rank's tokens, width].

    A single block keeps 3 that every tensor rank has whole (residual, normalised, input), and split
    over them the fused projection (3 + 2 x mlp_ratio), query and key (2), the gated MLP (mlp_ratio)
    and both joined (mlp_ratio + 1). Ulysses keeps 14 beside the projection: query and key, all
    three stacked, sent and received (2 + 3 x 3), and the answer on its way back (3). A double block
    keeps 8, all whole. torchao makes FP8 of activations through fp32, with 6.5 of what it is given:
    both joined in a single block, one in a double block, where 5 are kept by then. Rotary tables
    come to that, two of a head's width in fp32.
    """
    parts, ratio = forward.parallel.sequence, config.mlp_ratio
    tokens = (num_padded(forward.num_text, parts) + num_padded(forward.num_image, parts)) // parts
    split = joined = 6 + 4 * ratio
    whole = 8.0
    if parts > 1:
        split = max(split, 17 + 2 * ratio)
    if forward.quantizes_activations:
        split, whole = max(split, joined + 6.5 * (ratio + 1)), 12.0
    units = max(3 + split / forward.parallel.tensor, whole)
    inputs = held_bytes(config, forward.num_text, forward.num_image, forward.size)
    # Of the image that is drawn, not of those that wait.
    tables = (forward.num_text + forward.num_image) * 2 * sum(config.axes_dims_rope) * FP32
    width = config.num_attention_heads * config.attention_head_dim
    return int(tokens * width * units * forward.size + tables) + inputs


def decode_bytes(vae: Any, pixels: int, size: int) -> int:
    """Three maps of the last upsampling's channels; above a megapixel, of one tile."""
    channels = (vae.decoder_block_out_channels or vae.block_out_channels)[1]
    whole = min(pixels, MAX_WHOLE_PIXELS)
    joined = 2 * 3 * pixels if pixels > whole else 0
    return int((3 * channels * whole + joined) * size)


def encode_bytes(vae: Any, pixels: int, size: int) -> int:
    """Five maps of the first channels, for one reference: they are encoded one by one."""
    return int(5 * vae.block_out_channels[0] * pixels * size)


def prompt_bytes(
    config: Any, num_text: int, num_ranks: int, size: int, *, quantizes_activations: bool = False
) -> int:
    """The hidden states of all layers are kept to the end; the last MLP has three of its width.

    Where torchao makes FP8 of activations, its last product has one of that width and 6.5 more.
    """
    kept = (config.num_hidden_layers + 2) * config.hidden_size
    units = 1 + 6.5 if quantizes_activations else 3
    inner = units * config.intermediate_size / num_ranks
    # A hundredth for the rest: ids, cosines and sines. As measured.
    return int(1.01 * num_text * (kept + inner) * size)


def held_bytes(config: Any, num_text: int, num_image: int, size: int) -> int:
    """What a request that waits for its next step holds: its prompt and latents.

    Under a mask it holds the noise and what is kept too: 8 MB at four megapixels in bf16, nothing
    beside a step.
    """
    return int((num_text * config.joint_attention_dim + num_image * config.in_channels) * size)
