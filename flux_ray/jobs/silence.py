"""Tells which rows have stayed as they are for so long, by a clock that nobody sets."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, NamedTuple, TypeVar

Clock = Callable[[], float]
M = TypeVar("M", bound=Hashable)

# Of `after_s`: what one look may add. Time in which nobody could look is not silence: the database
# or this process was away, and the others may have been as well.
MAX_GAP = 1 / 3


class Seen(NamedTuple, Generic[M]):
    """What was seen of a row, and for how many seconds nothing else was."""

    mark: M
    silent_s: float


class Silence(Generic[M]):
    """Rows by their ids, each with a mark that changes with every sign of life.

    Whoever watches counts by its own `clock`: clocks that are set, here or at the database, make
    nobody silent. It has to watch for `after_s` itself before it says so of anybody.
    """

    def __init__(self, after_s: float, clock: Clock = time.monotonic) -> None:
        self._after_s = after_s
        self._clock = clock
        self._seen: dict[str, Seen[M]] = {}
        self._seen_at_s: float | None = None

    def begin(self) -> float:
        """Return the time of a look that is about to begin, for `look`."""
        return self._clock()

    def look(self, marks: Mapping[str, M], begun_s: float) -> None:
        """Take down what there is to see; rows that are not among it are forgotten."""
        gap_s = 0.0
        if self._seen_at_s is not None:
            # From when the last look was over: what it saw may have been true until then.
            gap_s = min(max(begun_s - self._seen_at_s, 0.0), MAX_GAP * self._after_s)
        self._seen = {name: self._seen_again(name, mark, gap_s) for name, mark in marks.items()}
        self._seen_at_s = self._clock()

    def _seen_again(self, name: str, mark: M, gap_s: float) -> Seen[M]:
        before = self._seen.get(name)
        if before is None or before.mark != mark:
            return Seen(mark, 0.0)
        return Seen(mark, before.silent_s + gap_s)

    @property
    def silent(self) -> dict[str, M]:
        """Those that gave no sign for `after_s`, with the marks that they had all the while."""
        return {
            name: seen.mark for name, seen in self._seen.items() if seen.silent_s >= self._after_s
        }
