"""Two watchdogs of a replica: one for calls that take too long, one for a silent leader.

`StepWatchdog` tells a leader how long a call may take before the ranks count as hung.
`LeaderWatch` runs in each rank, and ends it if its leader hangs or is cut off: nobody else would
free the rank's GPU then.
"""

import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable

from flux_ray.liveness import LOOK_S, Liveness
from flux_ray.replica.process import end_process

logger = logging.getLogger("ray.serve")

FACTOR = 10
# Recent calls of each kind whose times are kept: the longest of them counts, so that one short call
# does not lower the limit.
NUM_REMEMBERED = 16
# Leaders ping every other second. The ledger ends a leader that hangs sooner than this, and the
# ranks with it: this limit is for a leader that nobody else can reach.
LEADER_HUNG_S = 12.0


class StepWatchdog:
    """The time limits of calls: ten times the longest recent call of the kind, within bounds.

    A limit is never below `floor_s` nor above `limit_s`. Calls are of one kind if they have the
    same method and sizes within a factor of two, in pixels or any other unit of work. Their times
    then differ by at most four (attention is quadratic), and few kinds have to be remembered,
    whatever callers ask for.
    """

    def __init__(self, floor_s: float, limit_s: float) -> None:
        self._floor_s = floor_s
        self._limit_s = limit_s
        self._seconds: defaultdict[tuple[object, ...], deque[float]] = defaultdict(
            lambda: deque(maxlen=NUM_REMEMBERED)
        )

    def seconds_for(self, *methods: str, sizes: tuple[int, ...] = ()) -> float:
        """Return the time limit for these methods together; `limit_s` if one was never seen."""
        longest_s = sum(self.longest_s(method, sizes) for method in methods)
        return min(self._limit_s, max(self._floor_s, FACTOR * longest_s))

    def longest_s(self, method: str, sizes: tuple[int, ...] = ()) -> float:
        """Return the seconds of the longest recent call of that kind; inf if there was none."""
        return max(self._seconds.get(kind_of(method, sizes), ()), default=math.inf)

    def learn(self, seconds: float, method: str, sizes: tuple[int, ...] = ()) -> None:
        """Remember that a call of that kind took so many seconds."""
        self._seconds[kind_of(method, sizes)].append(seconds)


def kind_of(method: str, sizes: tuple[int, ...]) -> tuple[object, ...]:
    """Return the kind of a call: its method, and the power of two below each of its sizes."""
    return (method, *(size.bit_length() for size in sizes))


class LeaderWatch:
    """A thread that ends this process when its leader has been silent for `limit_s` seconds.

    The silence counts from the first ping, since leaders send none until all ranks are loaded.
    """

    def __init__(
        self,
        rank: str,
        limit_s: float = LEADER_HUNG_S,
        look_s: float = LOOK_S,
        end: Callable[[], object] = end_process,
    ) -> None:
        self._rank = rank
        self._look_s = look_s
        self._end = end
        self._liveness = Liveness(limit_s, look_s)

    def hear(self) -> None:
        """Note a ping of the leader."""
        self._liveness.hear("leader")

    def start(self) -> None:
        """Start the thread. The one that runs stages cannot watch: a stage may take a minute."""
        threading.Thread(target=self._look, name="leader-watch", daemon=True).start()

    def _look(self) -> None:
        while not self._liveness.look(time.monotonic()):
            time.sleep(self._look_s)
        logger.error("%s ends: its leader hangs", self._rank)
        self._end()
