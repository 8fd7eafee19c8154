"""A cache of encoded prompts and references that is bounded in bytes."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """A least-recently-used cache of at most `max_bytes`, on the thread of one rank.

    Names and sizes alone decide what is kept, never time or free memory: all ranks of a replica get
    the same calls and so keep the same entries. A rank that had to encode what another one still
    had would wait in a collective that the other never joins.
    """

    def __init__(self, max_bytes: int, bytes_of: Callable[[Value], int]) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._bytes_of = bytes_of
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, name: str) -> Value | None:
        """Return the value stored under `name`, or None; a hit makes it the most recent."""
        if name not in self._values:
            return None
        self._values.move_to_end(name)
        return self._values[name]

    def put(self, name: str, value: Value) -> None:
        """Store a value under a name that is not in the cache, and evict the oldest to fit it.

        A value larger than `max_bytes` is not stored: it would evict everything and still not fit.
        Nor is one of no bytes: finding it would save nothing, and its name counts for nothing here.
        """
        num_bytes = self._bytes_of(value)
        if not 0 < num_bytes <= self.max_bytes:
            return
        self._values[name] = value
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._values.popitem(last=False)
            self.num_bytes -= self._bytes_of(oldest)
