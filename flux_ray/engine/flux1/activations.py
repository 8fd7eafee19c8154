"""Estimate the bytes that denoising and encoding prompts need at their peak, besides the weights.

The estimate counts the tensors that are alive at once in eager mode, with attention that does not
keep its scores. Tests hold it to within 10 % of what the modules allocate on the meta
device.
"""

from typing import Any

from flux_ray.engine.api import Forward
from flux_ray.parallel.sequence import num_padded

FP32 = 4
# Of the MLPs: how much wider they are inside than the model.
RATIO = 4


def denoise_bytes(config: Any, forward: Forward) -> int:
    """Return the peak bytes of a forward on one rank; `config` is the transformer's.

    They are counted in units of one tensor [this rank's tokens, width]:

    - In its attention a single block holds 3 that every tensor rank has whole (residual,
      normalised, input), and split over the tensor ranks the MLP (4) and what becomes of query,
      key and value (10). Ulysses sends and receives these, which makes 15, or 19 with padding.
    - At its end it holds 5 whole (the output, and that times its gate), and split over the ranks
      attention, MLP and both joined (10).
    - A double block holds 7 of the image's tokens and 1 of the text's whole, and the MLP split.
    - torchao converts activations to FP8 through fp32, which takes 6.5 times their size: in a
      single block the joined tensor, in a double block one unit, when 5 others are alive.

    Rotary tables are added, two of a head's width per token, in fp32: those of the request, and
    those of text and image joined. Ranks that share tokens hold all of them and their own.
    """
    parallel = forward.parallel
    parts, tensor = parallel.sequence, parallel.tensor
    padded = [num_padded(number, parts) for number in (forward.num_text, forward.num_image)]
    text, image = (number // parts for number in padded)
    split = 10 + RATIO
    if parts > 1:
        is_padded = sum(padded) > forward.num_text + forward.num_image
        split = RATIO + (19 if is_padded else 15)
    joined = 2 * (RATIO + 1)
    single = max(3 + split / tensor, 5 + joined / tensor)
    double = (7 + RATIO / tensor) * image + text
    if forward.quantizes_activations:
        single = max(single, 3 + (joined + 6.5 * (RATIO + 1)) / tensor)
        double = max(double, 12 * (text + image))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    units = max(single * (text + image), double)
    table = 2 * sum(config["axes_dims_rope"]) * FP32
    given = held_bytes(config, forward.num_text, forward.num_image, forward.size)
    given += (forward.num_text + forward.num_image) * table
    if parts > 1:
        # A rank's part is a view of a padded copy.
        given *= 2
    return int(units * width * forward.size + (text + image) * table) + given


def prompt_bytes(
    config: Any, num_text: int, num_ranks: int, size: int, *, quantizes_activations: bool = False
) -> int:
    """Return the peak bytes of encoding one prompt on one of `num_ranks` ranks with T5.

    The bias of a rank's heads for each pair of tokens is kept to the end. An MLP holds 2 tensors of
    the model's width, and 4 of its inner width while it computes its GELU; if torchao quantizes
    activations, its last product holds 1 + 6.5 instead. For a short time there are also 57 bytes
    for each pair of tokens, from which the bias is looked up.
    """
    width, inner = config.d_model, config.num_heads * config.d_kv
    bias = config.num_heads * num_text * size / num_ranks
    mlp = (1 + 6.5 if quantizes_activations else 4) * config.d_ff / num_ranks
    pairs = 57 * num_text + (2 * width + 3 * inner / num_ranks) * size
    return int(num_text * max(bias + (2 * width + mlp) * size, pairs))


def held_bytes(config: Any, num_text: int, num_image: int, size: int) -> int:
    """Return the bytes that a request holds while it waits for its next step: prompt and latents.

    The latents of Fill and Control are beside channels of the same token, which are held too.
    """
    text = num_text * config["joint_attention_dim"] + config["pooled_projection_dim"]
    return int((text + num_image * config["in_channels"]) * size)
