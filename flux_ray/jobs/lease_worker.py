"""The loop of whoever works for the store: claims one thing after another, so many at once."""

import asyncio
import contextvars
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple

from flux_ray.errors import StoreLost

logger = logging.getLogger("ray.serve")

# How soon it is seen what another gateway has put into the store.
POLL_S = 0.5
# Before a store that is away is asked again.
PAUSE_S = 1.0

Work = Coroutine[Any, Any, None]


class LeasedJob(NamedTuple):
    """Work on what was claimed, which gives it back if it is cancelled, and whose it is.

    `pool`: of what it takes up room; those of other pools find theirs.
    """

    owner: str
    work: Work
    pool: str = ""


class Busy(NamedTuple):
    """What is not claimed now: of pools without room, and of owners with enough in a pool."""

    pools: frozenset[str]
    owners: frozenset[tuple[str, str]]


class LeaseWorker(ABC):
    """Works on at most `max_running` things of a pool at once, until it is stopped.

    An owner who has `max_per_owner` of them leaves the rest to others.
    """

    def __init__(
        self,
        max_running: int,
        max_per_owner: float,
        poll_s: float = POLL_S,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._max_running = max_running
        self._max_per_owner = max_per_owner
        self._poll_s = poll_s
        self._pause_s = pause_s
        self._is_stopping = False
        self._news = asyncio.Event()
        self._claiming: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()
        # By pool and owner.
        self._held: Counter[tuple[str, str]] = Counter()

    @abstractmethod
    async def claim(self, busy: Busy) -> LeasedJob | None:
        """One thing more, but of what is busy; None: there is none. Raises StoreLost."""

    @property
    def num_running(self) -> int:
        """Things that it works on."""
        return len(self._running)

    def start(self) -> None:
        """Begin to claim, unless it was stopped."""
        if not self._is_stopping:
            self._claiming = spawn(self._claim_on())
            self._claiming.add_done_callback(self._start_again)

    def wake(self) -> None:
        """There is something to claim: do not wait for the next look."""
        self._news.set()

    def stop_claiming(self) -> None:
        """Claim no more; what runs goes on."""
        self._is_stopping = True
        self._news.set()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Claim no more, see work end for `drain_s`, and give the rest back to others at once."""
        self.stop_claiming()
        if self._claiming is not None:
            # A claim under way is seen to its end: its lease would have to run out.
            await asyncio.wait({self._claiming})
        if self._running and drain_s > 0:
            await asyncio.wait(self._running, timeout=drain_s)
        left = tuple(self._running)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)

    def _start_again(self, claiming: "asyncio.Task[None]") -> None:
        """After a mistake of ours, too: without claims everything would wait in vain."""
        if not self._is_stopping:
            asyncio.get_running_loop().call_later(self._pause_s, self.start)

    async def _claim_on(self) -> None:
        while not self._is_stopping:
            # Before the look: what comes during it is looked for again.
            self._news.clear()
            pause_s = await self._claim_once()
            if pause_s != 0:
                await self._wait_for_news(pause_s)

    @property
    def busy(self) -> Busy:
        """Return what it has no room for."""
        held: Counter[str] = Counter()
        for (pool, _), num in self._held.items():
            held[pool] += num
        return Busy(
            frozenset(pool for pool, num in held.items() if num >= self._max_running),
            frozenset(each for each, num in self._held.items() if num >= self._max_per_owner),
        )

    async def _claim_once(self) -> float:
        """Seconds until it is worth another look."""
        try:
            claim = await self.claim(self.busy)
        except StoreLost as error:
            logger.warning("the %s claims nothing: %s", type(self).__name__.lower(), error)
            return self._pause_s
        if claim is None:
            return self._poll_s
        task = spawn(claim.work)
        self._running.add(task)
        place = (claim.pool, claim.owner)
        self._held[place] += 1
        task.add_done_callback(partial(self._make_room, place))
        return 0.0

    def _make_room(self, place: tuple[str, str], task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        # Who has none left is not remembered.
        self._held -= Counter({place: 1})
        self._news.set()

    async def _wait_for_news(self, timeout_s: float) -> None:
        """There is more to claim or more room, it is to stop, or the time is over."""
        if self._is_stopping:
            return
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            return


def spawn(work: Work) -> "asyncio.Task[None]":
    """A task of no request: a client that leaves ends only its own work."""
    task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
    task.add_done_callback(tell_of_failure)
    return task


async def repeat(make: Callable[[], Work], period_s: float) -> None:
    """Do work again and again, `period_s` after the last time, for ever.

    Each round is a task, which tells of its failure: a mistake of ours ends only that round.
    """
    while True:
        round_ = spawn(make())
        try:
            await asyncio.wait({round_})
        finally:
            round_.cancel()
        await asyncio.sleep(period_s)


def tell_of_failure(task: "asyncio.Task[None]") -> None:
    """A mistake of ours, that somebody has to hear of; what it held waits for its lease to end."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("work for the store of jobs failed", exc_info=error)
