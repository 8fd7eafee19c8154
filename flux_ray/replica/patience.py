"""How long a call may take before whoever was called is taken for hung."""

import math
from collections import defaultdict, deque

FACTOR = 10
NUM_REMEMBERED = 16


class StepWatchdog:
    """Ten times what such calls took of late, but at least `floor_s` and at most `limit_s`.

    Calls are alike when they have the same method and about the same size, in pixels or any other
    unit of work: within a factor of two, which is at most four in time (attention). So what is
    remembered stays small whatever callers ask for.
    """

    def __init__(self, floor_s: float, limit_s: float) -> None:
        self._floor_s = floor_s
        self._limit_s = limit_s
        self._seconds: defaultdict[tuple[object, ...], deque[float]] = defaultdict(
            lambda: deque(maxlen=NUM_REMEMBERED)
        )

    def seconds_for(self, *methods: str, sizes: tuple[int, ...] = ()) -> float:
        """For all of these together; the limit where one of them was never seen."""
        longest_s = sum(self.longest_s(method, sizes) for method in methods)
        return min(self._limit_s, max(self._floor_s, FACTOR * longest_s))

    def longest_s(self, method: str, sizes: tuple[int, ...] = ()) -> float:
        """What the longest of the last such calls took; infinite for one that was never seen."""
        return max(self._seconds.get(kind_of(method, sizes), ()), default=math.inf)

    def learn(self, seconds: float, method: str, sizes: tuple[int, ...] = ()) -> None:
        """One such call took so long."""
        self._seconds[kind_of(method, sizes)].append(seconds)


def kind_of(method: str, sizes: tuple[int, ...]) -> tuple[object, ...]:
    """What calls that are alike have in common."""
    return (method, *(size.bit_length() for size in sizes))
