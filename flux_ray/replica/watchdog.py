"""A rank's watch on its leader: one that hangs, or is cut off, is not to keep the rank's card.

How long a call may take before whoever was called is taken for hung.
"""

import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable

from flux_ray.liveness import LOOK_S, Liveness
from flux_ray.replica.process import end_process

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


logger = logging.getLogger("ray.serve")

# A leader pings every other second. Whoever watches leaders ends one that hangs sooner than that,
# and its ranks with it: this is for a leader that nobody else reaches.
HUNG_S = 12.0


class LeaderWatch:
    """Ends this process when its leader has fallen silent, whatever else the process does.

    It begins with the first ping: until all ranks are loaded, there is none.
    """

    def __init__(
        self,
        rank: str,
        limit_s: float = HUNG_S,
        look_s: float = LOOK_S,
        end: Callable[[], object] = end_process,
    ) -> None:
        self._rank = rank
        self._look_s = look_s
        self._end = end
        self._liveness = Liveness(limit_s, look_s)

    def hear(self) -> None:
        """The leader pinged."""
        self._liveness.hear("leader")

    def start(self) -> None:
        """Look from now on, on a thread: that of the stages may be in one for a minute."""
        threading.Thread(target=self._look, name="leader-watch", daemon=True).start()

    def _look(self) -> None:
        while not self._liveness.look(time.monotonic()):
            time.sleep(self._look_s)
        logger.error("%s ends: its leader hangs", self._rank)
        self._end()
