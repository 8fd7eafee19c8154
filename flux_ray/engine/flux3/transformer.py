"""FLUX.3's transformer: diffusers' own, with what it lacks to be split over ranks.

Each kind of token (text, image, references) first has blocks of its own, then all share the joint
blocks. diffusers has no tensor-parallel plan for it, so the plan is here, as data.
"""

from pathlib import Path
from typing import Any

from diffusers import Flux3ModularPipeline, Flux3Transformer2DModel
from diffusers.hooks.tensor_parallel import PackedColwiseParallel
from diffusers.models.transformers.transformer_flux3 import Flux3Attention
from torch import nn

from flux_ray.engine.api import Placement
from flux_ray.engine.loading import load_transformer
from flux_ray.engine.rotary import TableEmbedder
from flux_ray.parallel.lora import lora_deltas

BLOCKS = (
    "txt_mode_blocks",
    "mode_blocks.image",
    "mode_blocks.image_cond",
    "single_transformer_blocks",
)
# All blocks have the same layers. `linear_in` is the gate and the value of the MLP, fused.
LAYERS = {
    "attn.to_q": "colwise",
    "attn.to_k": "colwise",
    "attn.to_v": "colwise",
    "attn.to_out.0": "rowwise",
    "ff.linear_in": PackedColwiseParallel([1, 1]),
    "ff.linear_out": "rowwise",
}


PLAN = {f"{blocks}.*.{layer}": style for blocks in BLOCKS for layer, style in LAYERS.items()}


class Flux3Transformer(Flux3Transformer2DModel):  # type: ignore[misc]
    """diffusers' transformer with a tensor-parallel plan, which all that count or load ask for.

    Embedders, modulations and the output layer stay whole on every rank: 5 % of the weights.
    """

    _tp_plan = PLAN


def load_split_transformer(folder: Path, placement: Placement) -> Any:
    """Load this rank's part of the transformer in a checkpoint's folder, LoRAs added."""
    deltas = lora_deltas(placement.loras, Flux3ModularPipeline, placement.device)
    transformer: Any = load_transformer(Flux3Transformer, folder, placement, deltas)
    set_local_heads(transformer, placement.mesh.tensor.size)
    transformer.pos_embed = TableEmbedder(transformer.pos_embed)
    return transformer


def set_local_heads(transformer: nn.Module, num_ranks: int) -> None:
    """Tell each attention how many of the heads a rank has.

    FLUX.3's attention cuts its projections into `heads` parts. With the number of all heads, a rank
    would cut its share into as many, which are too small.
    """
    for module in transformer.modules():
        if isinstance(module, Flux3Attention):
            module.heads //= num_ranks


def check_sequence(num_ranks: int) -> None:
    """Raise ValueError if the tokens were to be split over several ranks."""
    if num_ranks > 1:
        raise ValueError(
            f"FLUX.3 cannot split its tokens over ranks, and parallel.sequence is {num_ranks}:"
            " set it to 1, and parallel.tensor instead"
        )
