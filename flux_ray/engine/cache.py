"""What was lately made of prompts and references, within so many bytes."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """The least recently used are forgotten first.

    What is kept is decided by names and sizes alone: ranks that are asked the same keep the same,
    and none of them waits for another that has it.
    """

    def __init__(self, max_bytes: int, bytes_of: Callable[[Value], int]) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._bytes_of = bytes_of
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, name: str) -> Value | None:
        """The value of that name, if it is still there."""
        if name not in self._values:
            return None
        self._values.move_to_end(name)
        return self._values[name]

    def put(self, name: str, value: Value) -> None:
        """Keep it, unless it is larger than all there is room for. Its name is new here."""
        num_bytes = self._bytes_of(value)
        if num_bytes > self.max_bytes:
            return
        self._values[name] = value
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._values.popitem(last=False)
            self.num_bytes -= self._bytes_of(oldest)
