"""The loop of whoever works for the store: claims one thing after another, so many at once."""

import asyncio
import contextvars
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Coroutine
from functools import partial
from typing import Any, NamedTuple

from flux_ray.errors import StoreLost

logger = logging.getLogger("ray.serve")

# How soon it is seen what another gateway has put into the store.
POLL_S = 0.5
# Before a store that is away is asked again.
PAUSE_S = 1.0

Work = Coroutine[Any, Any, None]


class Claim(NamedTuple):
    """Work on what was claimed, which gives it back if it is cancelled, and whose it is."""

    owner: str
    work: Work


class Claimer(ABC):
    """Works on at most `max_running` things at once, until it is stopped.

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
        self._held: Counter[str] = Counter()

    @abstractmethod
    async def claim(self, but_of: Collection[str]) -> Claim | None:
        """One thing more, but of those owners; None: there is none. Raises StoreLost."""

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

    async def stop(self, drain_s: float = 0.0) -> None:
        """Claim no more, see work end for `drain_s`, and give the rest back to others at once."""
        self._is_stopping = True
        self._news.set()
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
            pause_s = await self._claim_once() if self._has_room() else None
            if pause_s != 0:
                await self._wait_for_news(pause_s)

    def _has_room(self) -> bool:
        return self.num_running < self._max_running

    async def _claim_once(self) -> float:
        """Seconds until it is worth another look."""
        busy = [owner for owner, num in self._held.items() if num >= self._max_per_owner]
        try:
            claim = await self.claim(busy)
        except StoreLost as error:
            logger.warning("the %s claims nothing: %s", type(self).__name__.lower(), error)
            return self._pause_s
        if claim is None:
            return self._poll_s
        task = spawn(claim.work)
        self._running.add(task)
        self._held[claim.owner] += 1
        task.add_done_callback(partial(self._make_room, claim.owner))
        return 0.0

    def _make_room(self, owner: str, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        # Who has none left is not remembered.
        self._held -= Counter({owner: 1})
        self._news.set()

    async def _wait_for_news(self, timeout_s: float | None) -> None:
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


def tell_of_failure(task: "asyncio.Task[None]") -> None:
    """A mistake of ours, that somebody has to hear of; what it held waits for its lease to end."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("work for the store of jobs failed", exc_info=error)
