"""A component's safetensors files: any slice of any tensor, by name, without reading the rest.

What of each parameter a rank holds: a model's `_tp_plan` as slices, decided from shapes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs
from safetensors import safe_open
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


class Checkpoint:
    """The weights in `folder`, in one file or several with an index. Counts the bytes it takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_bytes_read = 0
        self._open: dict[Path, Any] = {}

    @cached_property
    def files(self) -> dict[str, Path]:
        """Which file holds which tensor."""
        indexes = sorted(self.folder.glob("*.safetensors.index.json"))
        if indexes:
            names: dict[str, str] = json.loads(indexes[0].read_text())["weight_map"]
            return {name: self._file(file) for name, file in names.items()}
        files = sorted(self.folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(
                f"{self.folder} needs one safetensors file, or several with their index;"
                f" it has {len(files)}"
            )
        with safe_open(files[0], "pt") as file:
            return dict.fromkeys(file.keys(), files[0])

    def _file(self, name: str) -> Path:
        if Path(name).name != name:
            raise ValueError(f"the index of {self.folder} points outside of it: {name}")
        return self.folder / name

    @contextmanager
    def opened(self) -> Iterator["Checkpoint"]:
        """Every file of it, opened once."""
        with ExitStack() as stack:
            for path in sorted(set(self.files.values())):
                self._open[path] = stack.enter_context(safe_open(path, "pt"))
            yield self
        self._open.clear()

    def read(self, name: str, shape: torch.Size, shard: Shard | None, axis: Axis) -> Tensor:
        """The tensor of that whole shape, or this rank's part of it; ValueError if there is none.

        The shape is compared first: a slice of a larger tensor would fit without a word.
        """
        if name not in self.files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        whole = self._open[self.files[name]].get_slice(name)
        if list(whole.get_shape()) != list(shape):
            raise ValueError(
                f"{name} in {self.folder} has the shape {whole.get_shape()}, not {list(shape)}"
            )
        tensor: Tensor = whole[:] if shard is None else shard.take(whole, axis)
        self.num_bytes_read += tensor.numel() * tensor.element_size()
        return tensor
