"""Pickles that come over a line: of values of ours, and of nothing that runs.

A pickle may name any function of any module and have it called. Whoever has come between two nodes
is not to run code on both of them.
"""

import io
import pickle
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

from flux_ray import request

# The frozen values of requests and answers, and what makes an error of ours again.
ALLOWED = frozenset(
    (kind.__module__, name)
    for name, kind in vars(request).items()
    if isinstance(kind, type) and is_dataclass(kind)
) | {("flux_ray.errors", "revived"), ("flux_ray.replica.transport", "StageFailed")}


class LineUnpickler(pickle.Unpickler):
    """Makes what is allowed, besides numbers, texts, bytes, tuples, lists, sets and dicts."""

    def find_class(self, module: str, name: str) -> Any:
        """As pickle asks it; UnpicklingError for everything else."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not go over a line")
        return super().find_class(module, name)


def unpickled(data: bytes | bytearray, buffers: Iterable[bytes] = ()) -> Any:
    """Return the value of a pickle; UnpicklingError if it is none of a line's."""
    return LineUnpickler(io.BytesIO(data), buffers=buffers).load()
