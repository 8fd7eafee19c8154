"""A rank's watch on its leader: one that hangs, or is cut off, is not to keep the rank's card."""

import logging
import threading
import time
from collections.abc import Callable

from flux_ray.liveness import LOOK_S, Liveness
from flux_ray.replica.process import end_process

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
