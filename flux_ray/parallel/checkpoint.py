"""A component's safetensors files: any slice of any tensor, by name, without reading the rest."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flux_ray.parallel.mesh import Axis
from flux_ray.parallel.shards import Shard


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
