"""The base of the workers that claim rows of the job database: jobs, and webhooks of ended jobs.

`LeaseWorker` claims one thing after another and runs the work of each as a task. `spawn` and
`repeat` start such tasks so that they outlive the request that started them and log their failures.
"""

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

# Seconds between polls: how soon work is seen that another gateway put into the store.
POLL_S = 0.5
# Seconds before a store that did not answer is asked again.
PAUSE_S = 1.0

Work = Coroutine[Any, Any, None]


class LeasedJob(NamedTuple):
    """A claim with the work to be done for it; if that is cancelled, it gives the claim back.

    `owner` and `pool` say against which limits it counts: each pool has its own room. The pool of
    a job is its tier; webhooks have one pool.
    """

    owner: str
    work: Work
    pool: str = ""


class Busy(NamedTuple):
    """The full pools, and the (pool, owner) pairs at their limit: not to be claimed now."""

    pools: frozenset[str]
    owners: frozenset[tuple[str, str]]


class LeaseWorker(ABC):
    """A loop that claims work and runs up to `max_running` claims of each pool at once.

    At most `max_per_owner` of them are of one owner, so that nobody fills a pool alone. It polls
    every `poll_s` seconds, and waits `pause_s` after an error. All of it runs on one event loop.
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
        # Running claims by (pool, owner).
        self._held: Counter[tuple[str, str]] = Counter()

    @abstractmethod
    async def claim(self, busy: Busy) -> LeasedJob | None:
        """Claim one thing more, except what `busy` names; None if there is none.

        Raises StoreLost.
        """

    @property
    def num_running(self) -> int:
        """Return how many claims it works on."""
        return len(self._running)

    def start(self) -> None:
        """Start the claiming loop, unless the worker was stopped."""
        if not self._is_stopping:
            self._claiming = spawn(self._claim_on())
            self._claiming.add_done_callback(self._start_again)

    def wake(self) -> None:
        """Look for work now, without waiting for the next poll."""
        self._news.set()

    def stop_claiming(self) -> None:
        """Stop claiming; what runs goes on."""
        self._is_stopping = True
        self._news.set()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Stop claiming, wait up to `drain_s` for running work, then cancel the rest.

        What is cancelled gives its claim back, so that another gateway can take it at once.
        """
        self.stop_claiming()
        if self._claiming is not None:
            # Not cancelled: if the claim has reached the database already, nobody would work on it
            # until its lease runs out.
            await asyncio.wait({self._claiming})
        if self._running and drain_s > 0:
            await asyncio.wait(self._running, timeout=drain_s)
        left = tuple(self._running)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)

    def _start_again(self, claiming: "asyncio.Task[None]") -> None:
        """Restart the claiming loop after a bug ended it, or every job would wait for ever."""
        if not self._is_stopping:
            asyncio.get_running_loop().call_later(self._pause_s, self.start)

    async def _claim_on(self) -> None:
        while not self._is_stopping:
            # Cleared before claiming: a wake during the claim then leads to another look.
            self._news.clear()
            pause_s = await self._claim_once()
            if pause_s != 0:
                await self._wait_for_news(pause_s)

    @property
    def busy(self) -> Busy:
        """Return the pools and owners that have no room for another claim."""
        held: Counter[str] = Counter()
        for (pool, _), num in self._held.items():
            held[pool] += num
        return Busy(
            frozenset(pool for pool, num in held.items() if num >= self._max_running),
            frozenset(each for each, num in self._held.items() if num >= self._max_per_owner),
        )

    async def _claim_once(self) -> float:
        """Claim and start one thing; return the seconds until the next look."""
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
        # Subtraction drops owners at zero, where `-= 1` would keep an entry for each for ever.
        self._held -= Counter({place: 1})
        self._news.set()

    async def _wait_for_news(self, timeout_s: float) -> None:
        """Wait until woken, until a claim ends, until stopped, or for `timeout_s`."""
        if self._is_stopping:
            return
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            return


def spawn(work: Work) -> "asyncio.Task[None]":
    """Start a task in an empty context, so that it does not end with the client of a request."""
    task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
    task.add_done_callback(tell_of_failure)
    return task


async def repeat(make: Callable[[], Work], period_s: float) -> None:
    """Run the work that `make` returns for ever, with `period_s` between two rounds.

    Each round is a task of its own that logs its failure: a bug ends one round, not the loop.
    """
    while True:
        round_ = spawn(make())
        try:
            await asyncio.wait({round_})
        finally:
            round_.cancel()
        await asyncio.sleep(period_s)


def tell_of_failure(task: "asyncio.Task[None]") -> None:
    """Log the error of a task that failed by a bug; its claim is free when its lease ends."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("work for the store of jobs failed", exc_info=error)
