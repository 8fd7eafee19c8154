"""What a process does, measured from outside of the code that does it."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STATUS = Path("/proc/self/status")
# Everyone who opens safetensors files, under the name that they took the class by.
READERS = (
    "safetensors.safe_open",
    "safetensors.torch.safe_open",
    "transformers.modeling_utils.safe_open",
    "flux_ray.parallel.checkpoint.safe_open",
)
NO_TRAFFIC = ("wait_tensor", "_wrap_tensor_autograd")


class Collectives(TorchDispatchMode):
    """The collectives within its `with`: (operator, bytes of one rank's tensor), in order.

    It sees torch.distributed's own operators and the functional ones, which DTensors call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it becomes operators on plain tensors, which come here again
        operator = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and operator not in NO_TRAFFIC:
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
            self.calls.append((operator, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.calls)


class CountedFile:
    """A safetensors file, or a slice in it, that notes the bytes of every tensor taken from it."""

    def __init__(self, opened: Any, sizes: list[int]) -> None:
        self._opened = opened
        self._sizes = sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __enter__(self) -> "CountedFile":
        self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._opened.__exit__(*error)

    def _count(self, tensor: Tensor) -> Tensor:
        self._sizes.append(tensor.nbytes)
        return tensor

    def get_tensor(self, name: str) -> Tensor:
        return self._count(self._opened.get_tensor(name))

    def get_tensors(self) -> dict[str, Tensor]:
        return {name: self._count(tensor) for name, tensor in self._opened.get_tensors().items()}

    def get_slice(self, name: str) -> "CountedFile":
        return CountedFile(self._opened.get_slice(name), self._sizes)

    def __getitem__(self, index: Any) -> Tensor:
        return self._count(self._opened[index])


@contextmanager
def counted_reading() -> Iterator[list[int]]:
    """The bytes of every tensor, or part of one, that anybody takes from a safetensors file."""
    sizes: list[int] = []
    real = safetensors.safe_open

    def open_counted(*args: Any, **options: Any) -> CountedFile:
        return CountedFile(real(*args, **options), sizes)

    with ExitStack() as stack:
        for reader in READERS:
            stack.enter_context(mock.patch(reader, open_counted))
        yield sizes


class PeakMemory:
    """How far this process's resident memory grows within its `with`: `anonymous`, `resident`.

    Resident memory is anonymous memory and pages of mapped files, which ranks of one machine share.
    """

    def __enter__(self) -> "PeakMemory":
        # What was freed before and kept would be taken again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        self._start = self._peak = resident_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self.anonymous, self.resident = (
            peak - start for peak, start in zip(self._peak, self._start, strict=True)
        )

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._look()
            time.sleep(0.001)

    def _look(self) -> None:
        now = resident_bytes()
        self._peak = max(self._peak[0], now[0]), max(self._peak[1], now[1])


def resident_bytes() -> tuple[int, int]:
    """(anonymous, anonymous and of files)."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    anonymous, mapped = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, anonymous + mapped
