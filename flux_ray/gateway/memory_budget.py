"""Keep the bytes that this process holds for callers and jobs within one budget.

Everything counts in `MEMORY`: bodies that are read, images while they are decoded, references that
requests hold, and those of jobs. A caller that finds no room is refused with Overloaded. A job was
accepted, so it waits for room; while one waits, no new callers are let in, or a busy gateway would
never have room for it.
"""

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from flux_ray.errors import Overloaded

BUDGET_RETRY_AFTER_S = 2
FULL = "this gateway has as many bytes of requests in hand as it may: come back in a moment"

T = TypeVar("T")


class Share:
    """Bytes of the budget held by one holder. Releasing it twice is harmless."""

    def __init__(self, held: "MemoryBudget", max_bytes: int) -> None:
        self.num_bytes = 0
        self._held = held
        self._max_bytes = max_bytes
        self.is_released = False

    def grow(self, num_bytes: int) -> None:
        """Hold `num_bytes` more. Raise Overloaded, and hold what it held, if they do not fit."""
        self._held.take(self, num_bytes, self._max_bytes)

    def release(self) -> None:
        """Give all bytes back; the share can hold nothing afterwards."""
        self._held.give_back(self)

    def hold_with(self, value: T) -> T:
        """Release the share when nobody holds `value` any more; return `value`."""
        # At exit nothing has to be given back: the budget ends with the process.
        weakref.finalize(value, self.release).atexit = False
        return value


class Waiter:
    """A job that waits for room, in its own event loop; it may be woken from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Make the waiter check for room again."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._woken.set)

    async def wait(self) -> None:
        """Wait until somebody calls `wake`."""
        await self._woken.wait()
        self._woken.clear()


class MemoryBudget:
    """The budget of a process. Called from event loops and from the threads that decode."""

    def __init__(self) -> None:
        self.num_bytes = 0
        # Of requests, since the process began.
        self.num_refused = 0
        # Reentrant: the finalizer of an image may run anywhere, even in this thread while it has
        # the lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self.num_work_bytes = 0
        self._waiters: deque[Waiter] = deque()

    def check_room(self, num_bytes: int, max_bytes: int) -> None:
        """Raise Overloaded if a job waits for room, or if so many more bytes do not fit."""
        with self._lock:
            if self._waiters or self.num_bytes + num_bytes > max_bytes:
                raise self._refusal()

    def share(self, max_bytes: int) -> Share:
        """Return a share that holds nothing yet; all shares together hold at most `max_bytes`."""
        return Share(self, max_bytes)

    def add(self, value: T, num_bytes: int, max_bytes: int) -> T:
        """Hold `num_bytes` for as long as anybody holds `value`; return that. Raise Overloaded."""
        share = self.share(max_bytes)
        share.grow(num_bytes)
        return share.hold_with(value)

    @contextmanager
    def working(self, num_bytes: int, max_bytes: int) -> Iterator[None]:
        """Hold `num_bytes` of working memory within; block until those who work leave room.

        Working memory has a limit of its own, `max_bytes`: a request keeps its decoded images while
        it waits to decode the next one, so under one common limit such requests could block each
        other for good. More than `max_bytes` is let in while nobody else works. Called from threads
        only.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._can_work(num_bytes, max_bytes))
            self.num_work_bytes += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self.num_work_bytes -= num_bytes
                self._changed.notify_all()

    async def room(self, num_bytes: int, max_bytes: int) -> Share:
        """Wait until `num_bytes` fit, and return a share that holds them. First come, first served.

        More than `max_bytes` is let in while nobody else holds any: a job must not wait forever.
        """
        share = self.share(max_bytes)
        waiter = Waiter()
        with self._lock:
            self._waiters.append(waiter)
        try:
            while not self._let_in(waiter, share, num_bytes, max_bytes):
                await waiter.wait()
        finally:
            self._leave(waiter)
        return share

    def take(self, share: Share, num_bytes: int, max_bytes: int) -> None:
        """Add to the share unless it was released. Raise Overloaded if there is no room."""
        with self._lock:
            if share.is_released:
                return
            if self.num_bytes + num_bytes > max_bytes:
                raise self._refusal()
            self._add(share, num_bytes)

    def give_back(self, share: Share) -> None:
        """Take all that the share holds out of the budget, and wake the first waiter."""
        with self._lock:
            share.is_released = True
            num_bytes, share.num_bytes = share.num_bytes, 0
            self.num_bytes -= num_bytes
            if num_bytes:
                self._wake_first()

    def _refusal(self) -> Overloaded:
        self.num_refused += 1
        return Overloaded(FULL, None, BUDGET_RETRY_AFTER_S)

    def _can_work(self, num_bytes: int, max_bytes: int) -> bool:
        return not self.num_work_bytes or self.num_work_bytes + num_bytes <= max_bytes

    def _let_in(self, waiter: Waiter, share: Share, num_bytes: int, max_bytes: int) -> bool:
        with self._lock:
            has_room = self.num_bytes == 0 or self.num_bytes + num_bytes <= max_bytes
            # Only the first in line, or small requests would keep overtaking a large one.
            if self._waiters[0] is not waiter or not has_room:
                return False
            self._waiters.popleft()
            self._add(share, num_bytes)
            self._wake_first()
            return True

    def _leave(self, waiter: Waiter) -> None:
        with self._lock:
            # A waiter that was cancelled is still in line, and would block all behind it.
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._wake_first()

    def _add(self, share: Share, num_bytes: int) -> None:
        share.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def _wake_first(self) -> None:
        if self._waiters:
            self._waiters[0].wake()


MEMORY = MemoryBudget()
