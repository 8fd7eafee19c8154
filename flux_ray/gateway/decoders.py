"""The threads that decode: for the request that came first first, so that it is soon through.

In turns, all requests of a crowd would hold a part of their images, and none would have them all.
But whose image took long goes behind all that wait, or ten such images would keep them waiting.
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
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    def next_order(self) -> int:
        """Return the place of a request that comes now."""
        return next(self._numbers)

    def order_after(self, order: int, seconds: float) -> int:
        """Return the place of a request from now on, one of whose images took so many seconds."""
        return order if seconds < LONG_S else self.next_order()

    async def run(self, order: int, call: Callable[[], T]) -> T:
        """Return what the call returns, once it is its turn; the lowest `order` comes first."""
        await self._enter(order)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        finally:
            self._leave()

    async def _enter(self, order: int) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (order, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return what the call returns, and the seconds of a processor that this thread took for it."""
    started_s = time.thread_time()
    return call(), time.thread_time() - started_s


DECODERS = Decoders(min(8, os.cpu_count() or 1))
