"""The bytes that one card has to hold, by component; weights to the byte."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flux_ray.config.tier import Quantization
from flux_ray.parallel.load import plan_storage, saved_tensors
from flux_ray.parallel.mesh import Axis
from flux_ray.parallel.precision import is_quantized
from flux_ray.parallel.shards import shards_for

# What a product with a quantized weight allocates for each of its numbers where the weight has to
# be unpacked first: torchao's FP8 by way of fp32, the others straight to a dtype of two bytes.
UNPACKED_BYTES = {"fp8": 10, "int8": 2, "nf4": 2}


@dataclass(frozen=True)
class Footprint:
    """Bytes on one card, by component."""

    transformer: int = 0
    text_encoder: int = 0
    vae: int = 0
    activations: int = 0
    communication: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        """What the card must have."""
        return sum(vars(self).values())


def weight_bytes(
    module: nn.Module,
    plan: Mapping[str, Any],
    axis: Axis,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> int:
    """What a rank of `axis` stores of a module: what the loader will assert that it does."""
    shards = shards_for(module, plan, axis.size)
    stored = plan_storage(module, shards, axis, dtype, quantization)
    return sum(tensor.num_bytes for tensor in stored.values())


def unpacked_bytes(
    module: nn.Module, plan: Mapping[str, Any], axis: Axis, quantization: Quantization | None
) -> int:
    """A product with the largest quantized weight, if it cannot be multiplied as it is."""
    if quantization is None:
        return 0
    shards = shards_for(module, plan, axis.size)
    sizes = (
        tensor.numel() // (axis.size if name in shards else 1)
        for name, tensor in saved_tensors(module)
        if is_quantized(name)
    )
    return max(sizes) * UNPACKED_BYTES[quantization]
