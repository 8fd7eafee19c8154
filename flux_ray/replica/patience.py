"""How long a call may take before whoever was called is taken for hung."""

from collections import defaultdict, deque

FACTOR = 10
NUM_REMEMBERED = 16


class Patience:
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

    def seconds_for(self, method: str, *sizes: int) -> float:
        """For a call of that kind; the limit for one that was never seen."""
        seen = self._seconds.get(kind_of(method, sizes))
        if not seen:
            return self._limit_s
        return min(self._limit_s, max(self._floor_s, FACTOR * max(seen)))

    def learn(self, seconds: float, method: str, *sizes: int) -> None:
        """One such call took so long."""
        self._seconds[kind_of(method, sizes)].append(seconds)


def kind_of(method: str, sizes: tuple[int, ...]) -> tuple[object, ...]:
    """What calls that are alike have in common."""
    return (method, *(size.bit_length() for size in sizes))
