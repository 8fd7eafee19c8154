"""The threads that decode: for the request that came first first, so that it is soon through.

In turns, all requests of a crowd would hold a part of their images, and none would have them all.
But whose image took long goes behind all that wait, or ten such images would keep them waiting. And
large images never have all threads: a small one would wait for the largest of them.
"""

import asyncio
import heapq
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# A request's order, its number among all that waited, and what it waits for.
Waiting = tuple[int, int, asyncio.Future[None]]

# Before all that have yet to begin.
FIRST = -1
# Of a processor: what most images of 20 megapixels take.
LONG_S = 1.0


class Decoders:
    """Runs calls on threads of its own, called from the event loop.

    What else asks for threads does not wait for images.
    """

    def __init__(self, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._num_free = num_threads
        self._num_free_for_large = max(num_threads - 1, 1)
        self._numbers = itertools.count()
        # By whether they are large.
        self._waiting: dict[bool, list[Waiting]] = {False: [], True: []}

    def next_order(self) -> int:
        """Return the place of a request that comes now."""
        return next(self._numbers)

    def order_after(self, order: int, seconds: float) -> int:
        """Return the place of a request from now on, one of whose images took so many seconds."""
        return order if seconds < LONG_S else self.next_order()

    async def run(self, order: int, call: Callable[[], T], is_large: bool = False) -> T:
        """Return what the call returns, once it is its turn; the lowest `order` comes first."""
        await self._enter(order, is_large)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        finally:
            self._leave(is_large)

    async def _enter(self, order: int, is_large: bool) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting[is_large], (order, next(self._numbers), turn))
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(is_large)
            raise

    def _leave(self, is_large: bool) -> None:
        self._num_free += 1
        self._num_free_for_large += is_large
        self._let_in()

    def _let_in(self) -> None:
        """Begin what may begin, the lowest order first."""
        while self._num_free:
            lanes = [False, True] if self._num_free_for_large else [False]
            lanes = [is_large for is_large in lanes if self._waiting[is_large]]
            if not lanes:
                return
            is_large = min(lanes, key=lambda is_large: self._waiting[is_large][0][:2])
            _, _, turn = heapq.heappop(self._waiting[is_large])
            if not turn.done():
                turn.set_result(None)
                self._num_free -= 1
                self._num_free_for_large -= is_large


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return what the call returns, and the seconds of a processor that this thread took for it."""
    started_s = time.thread_time()
    return call(), time.thread_time() - started_s


# Two at least, so that there is one for small images.
DECODERS = Decoders(min(8, max(2, os.cpu_count() or 1)))
