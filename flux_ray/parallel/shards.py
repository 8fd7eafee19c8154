"""What of each parameter a rank holds: a model's `_tp_plan` as slices, decided from shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs
from torch import Tensor, nn

from flux_ray.parallel.mesh import Axis


@dataclass(frozen=True)
class Shard:
    """A parameter split along `dim`, each of its fused `blocks` (sizes along `dim`) by itself."""

    dim: int
    blocks: tuple[int, ...]

    def ranges(self, axis: Axis) -> list[slice]:
        """This rank's part of every block."""
        ranges, begin = [], 0
        for block in self.blocks:
            size = block // axis.size
            start = begin + axis.rank * size
            ranges.append(slice(start, start + size))
            begin += block
        return ranges

    def take(self, whole: Any, axis: Axis) -> Tensor:
        """This rank's part of a tensor, or of a safetensors slice: only its bytes are read."""
        before = (slice(None),) * self.dim
        parts = [whole[(*before, part)] for part in self.ranges(axis)]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, self.dim)

    def local_shape(self, shape: torch.Size, axis: Axis) -> torch.Size:
        """The shape of this rank's part."""
        return torch.Size(
            size // axis.size if dim == self.dim else size for dim, size in enumerate(shape)
        )


Shards = Mapping[str, Shard]


def shards_for(model: nn.Module, plan: Mapping[str, Any], num_ranks: int) -> dict[str, Shard]:
    """By parameter name; a parameter that is not in it is whole on every rank.

    `plan` has diffusers' and transformers' styles (`colwise`, `rowwise`, packed). ValueError names
    the parameter whose blocks do not divide by `num_ranks`. Works on a model without weights.
    """
    if num_ranks == 1:
        return {}
    split = {path: style for path, style in plan.items() if not is_replicated(style)}
    specs = resolve_tp_shard_specs(model, split, num_ranks)
    return {
        name: Shard(spec.dim, tuple(spec.block_sizes))
        for name, spec in specs.items()
        if spec.dim is not None
    }


def is_replicated(style: Any) -> bool:
    """transformers also names what is not split, for training's sake."""
    return isinstance(style, str) and style.startswith("replicated")
