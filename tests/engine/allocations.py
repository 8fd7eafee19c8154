"""What a module's own code allocates at its peak, measured without memory on the meta device."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = ("all_reduce", "all_gather", "all_to_all_single")


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator makes, until Python lets go of it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel does it: nothing but its output."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return func(*args, **kwargs)


def nothing(*args: object, **options: object) -> None:
    """Unlike a mock it does not keep what it is called with."""


@contextmanager
def alone() -> Iterator[None]:
    """Collectives that do nothing: one rank of a group that is not there."""
    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch(f"torch.distributed.{name}", nothing))
        yield


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that is alive at once while `call` runs, of what it allocates itself."""
    with torch.inference_mode(), alone(), FusedAttention(), LiveBytes() as live:
        call()
    return live.peak
