"""Decide which slice of each parameter a rank holds, and read only that slice from the checkpoint.

A model's tensor-parallel plan is turned into a `Shard` for each parameter that is split; shapes
alone decide it, so the planner asks the same code without any weights. A `Checkpoint` reads slices
of a component's safetensors files by name.
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
from flux_ray.weights.shards import rank_file, read_manifest


@dataclass(frozen=True)
class Shard:
    """How a parameter is split along `dim`.

    `blocks` are the sizes along `dim` of the matrices that are fused in it, such as query, key and
    value. Each block is split by itself, so that a rank gets its heads of all three.
    """

    dim: int
    blocks: tuple[int, ...]

    def ranges(self, axis: Axis) -> list[slice]:
        """Return this rank's slice of each block, along `dim`."""
        ranges, begin = [], 0
        for block in self.blocks:
            size = block // axis.size
            start = begin + axis.rank * size
            ranges.append(slice(start, start + size))
            begin += block
        return ranges

    def take(self, whole: Any, axis: Axis) -> Tensor:
        """Return this rank's part of a tensor, contiguous and of the same dtype.

        `whole` may be a safetensors slice; then only the bytes of this part are read.
        """
        before = (slice(None),) * self.dim
        parts = [whole[(*before, part)] for part in self.ranges(axis)]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, self.dim)

    def local_shape(self, shape: torch.Size, axis: Axis) -> torch.Size:
        """Return the shape of a rank's part of a parameter of the whole `shape`."""
        return torch.Size(
            size // axis.size if dim == self.dim else size for dim, size in enumerate(shape)
        )


Shards = Mapping[str, Shard]


def shards_for(model: nn.Module, plan: Mapping[str, Any], num_ranks: int) -> dict[str, Shard]:
    """Return the shards by parameter name; all other parameters are whole on every rank.

    `plan` may use the styles of diffusers and of transformers (`colwise`, `rowwise`, packed), and
    `model` may be on the meta device. Raise ValueError, with the parameter's name, if its blocks do
    not divide by `num_ranks`.
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
    """Return whether a style means no split; transformers' plans list such layers for training."""
    return isinstance(style, str) and style.startswith("replicated")


class Checkpoint:
    """The safetensors files of one component: a single file, or several with an index.

    Tensors can be read only inside of `opened`. `num_bytes_read` counts what has been read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_bytes_read = 0
        self._open: dict[Path, Any] = {}

    @cached_property
    def files(self) -> dict[str, Path]:
        """Return the file of each tensor, by the tensor's name.

        Raise ValueError if the folder has no weights, or several files without an index.
        """
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
        # An index is downloaded data: it must not make us read files elsewhere.
        if Path(name).name != name:
            raise ValueError(f"the index of {self.folder} points outside of it: {name}")
        return self.folder / name

    @contextmanager
    def opened(self) -> Iterator["Checkpoint"]:
        """Open every file once, rather than once for each tensor, until the context ends."""
        with ExitStack() as stack:
            for path in sorted(set(self.files.values())):
                self._open[path] = stack.enter_context(safe_open(path, "pt"))
            yield self
        self._open.clear()

    def read(self, name: str, shape: torch.Size, shard: Shard | None, axis: Axis) -> Tensor:
        """Return a tensor in the file's dtype, whole or, with a shard, this rank's part of it.

        `shape` is that of the whole tensor. Raise ValueError if the checkpoint has no such tensor
        or one of another shape: a slice of a larger tensor would fit without any error.
        """
        whole = self._stored(name, shape)
        return self._counted(whole[:] if shard is None else shard.take(whole, axis))

    def _stored(self, name: str, shape: torch.Size) -> Any:
        """Return a slice of the file's tensor; raise ValueError if it has another shape."""
        if name not in self.files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        stored = self._open[self.files[name]].get_slice(name)
        if list(stored.get_shape()) != list(shape):
            raise ValueError(
                f"{name} in {self.folder} has the shape {stored.get_shape()}, not {list(shape)}"
            )
        return stored

    def _counted(self, tensor: Tensor) -> Tensor:
        self.num_bytes_read += tensor.numel() * tensor.element_size()
        return tensor


class RankCheckpoint(Checkpoint):
    """A component that `flux-ray weights shard` has split: a file with the parts of each rank."""

    def __init__(self, folder: Path, axis: Axis) -> None:
        super().__init__(folder)
        self._path = folder / rank_file(axis.rank, axis.size)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Return this rank's file for each tensor, by the tensor's name in the whole checkpoint."""
        with safe_open(self._path, "pt") as file:
            return dict.fromkeys(file.keys(), self._path)

    def read(self, name: str, shape: torch.Size, shard: Shard | None, axis: Axis) -> Tensor:
        """Return the tensor that `Checkpoint.read` cuts out of the whole checkpoint."""
        local = shape if shard is None else shard.local_shape(shape, axis)
        return self._counted(self._stored(name, local)[:])


def open_component(folder: Path, axis: Axis) -> Checkpoint:
    """Return the checkpoint of a component, whole or split for the ranks of `axis`.

    Raise ValueError if it is split for another number of ranks.
    """
    manifest = read_manifest(folder.parent)
    if manifest is None:
        return Checkpoint(folder)
    if (num_ranks := manifest.num_ranks[folder.name]) != axis.size:
        raise ValueError(
            f"{folder} is split for {num_ranks} ranks, and {axis.size} would read it: split it anew"
            " with `flux-ray weights shard`, for the tier's `parallel` and `text_encoder`"
        )
    return RankCheckpoint(folder, axis)
