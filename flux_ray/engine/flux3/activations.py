"""Estimate the bytes that denoising and encoding prompts need at their peak, besides the weights.

The estimate counts the tensors that are alive at once in eager mode, with attention that does not
keep its scores. Tests hold it to within 10 % of what the modules allocate on the meta device.
"""

from typing import Any

from flux_ray.engine.api import Forward

FP32 = 4


def denoise_bytes(config: Any, forward: Forward) -> int:
    """Return the peak bytes of a forward on one rank; `config` is the transformer's.

    They are counted in units of one tensor [tokens, width], which every rank has for all tokens:

    - A joint block holds 11 whole: 6 are shift, scale and gate of each token, for the blocks of its
      kind and for the joint ones; the others are residual, normalised, and joined. The MLP, split
      over the tensor ranks, holds 12: its fused input (6), the activated gate and the product.
    - At its end, where nothing is split, it holds 14.
    - With references, shift, scale and gate of image and references are joined: 3 more of these
      tokens. They are always counted, because the references are not told from the image here.
    - torchao converts activations to FP8 through fp32, which takes 6.5 times their size: of the
      product (3, split), when 11 and the product are alive, or of the normalised input (1).

    Rotary tables are added, two of a head's width per token, in fp32: those of each kind of token,
    and joined.
    """
    ranks, tokens = forward.parallel.tensor, forward.num_text + forward.num_image
    split, whole = 12.0, 14.0
    if forward.quantizes_activations:
        split, whole = 3 + 6.5 * 3, 11 + 6.5
    units = tokens * max(11 + split / ranks, whole) + 3 * forward.num_image
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tables = 2 * tokens * 2 * sum(config["axes_dims_rope"]) * FP32
    inputs = held_bytes(config, forward.num_text, forward.num_image, forward.size)
    return int(units * width * forward.size + tables) + inputs


def held_bytes(config: Any, num_text: int, num_image: int, size: int) -> int:
    """Return the bytes of prompt and latents, which a request holds between its steps."""
    text = num_text * config["joint_attention_dim"]
    return int((text + num_image * config["in_channels"]) * size)
