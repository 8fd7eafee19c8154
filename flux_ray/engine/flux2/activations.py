"""Estimate the bytes that each stage of a FLUX.2 request needs at its peak, besides the weights.

The estimate counts the tensors that are alive at once in eager mode, with attention that does not
keep its scores. Tests hold it to within 10 % of what the modules allocate on the meta device.
"""

from dataclasses import replace
from typing import Any

from flux_ray.engine.api import Forward
from flux_ray.parallel.sequence import num_padded

FP32 = 4


def denoise_bytes(config: Any, forward: Forward, num_inserted: int = 0) -> int:
    """Return the peak bytes of a forward on one rank; `config` is the transformer's.

    Attention also sees the keys and values of `num_inserted` tokens that are not in the forward.

    They are counted in units of one tensor [this rank's tokens, width]:

    - A single block holds 3 that every tensor rank has whole (residual, normalised, input). Split
      over the tensor ranks are the fused projection (3 + 2 x mlp_ratio), query and key (2), the
      gated MLP (mlp_ratio), and attention and MLP joined (mlp_ratio + 1).
    - Ulysses holds 14 besides the projection: query and key (2), all three stacked, sent and
      received (3 x 3), and the result on its way back (3).
    - Inside attention these 14, or without Ulysses query, key and result (3), stand beside the
      projection and the keys and values to which others were added.
    - A double block holds 8, all whole.
    - torchao converts activations to FP8 through fp32, which takes 6.5 times their size: in a
      single block the joined tensor, in a double block one unit, when 5 others are alive.

    Rotary tables are added, two of a head's width per token, in fp32.
    """
    parts, ratio = forward.parallel.sequence, config.mlp_ratio
    tokens = (num_padded(forward.num_text, parts) + num_padded(forward.num_image, parts)) // parts
    split = joined = 6 + 4 * ratio
    whole = 8.0
    if parts > 1:
        split = max(split, 17 + 2 * ratio)
    if num_inserted:
        inserted = 2 * num_inserted / parts / tokens
        split = max(split, (17 if parts > 1 else 8) + 2 * ratio + inserted)
    if forward.quantizes_activations:
        split, whole = max(split, joined + 6.5 * (ratio + 1)), 12.0
    units = max(3 + split / forward.parallel.tensor, whole)
    inputs = held_bytes(config, forward.num_text, forward.num_image, forward.size)
    # Only for the image of this step; those of waiting requests are not counted.
    tables = (forward.num_text + forward.num_image) * 2 * sum(config.axes_dims_rope) * FP32
    width = config.num_attention_heads * config.attention_head_dim
    return int(tokens * width * units * forward.size + tables) + inputs


def kept_bytes(config: Any, forward: Forward) -> int:
    """Return the bytes of the references' keys and values in all layers that a rank keeps."""
    width = config.num_attention_heads * config.attention_head_dim
    num_layers = config.num_layers + config.num_single_layers
    whole = 2 * num_layers * forward.num_reference * width * forward.size
    return int(whole // forward.parallel.num_ranks)


def kept_denoise_bytes(config: Any, forward: Forward) -> int:
    """Return the peak bytes on one rank of a klein KV, which keeps its references' keys and values.

    The peak is that of the forward of all references alone, or of a step of an image without them.
    What is kept of the current request is added; no other request is on the ranks.
    """
    num_own = forward.num_image - forward.num_reference
    peak = denoise_bytes(config, replace(forward, num_image=num_own), forward.num_reference)
    if forward.num_reference:
        alone = replace(forward, num_text=0, num_image=forward.num_reference)
        peak = max(peak, denoise_bytes(config, alone))
    return peak + kept_bytes(config, forward)


def held_bytes(config: Any, num_text: int, num_image: int, size: int) -> int:
    """Return the bytes that a request holds while it waits for its next step: prompt and latents.

    An inpainting request also holds the noise and the image's latents. They are not counted: 8 MB
    at 4 MP in bf16 is nothing compared to a step.
    """
    return int((num_text * config.joint_attention_dim + num_image * config.in_channels) * size)
