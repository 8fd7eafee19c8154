"""The bytes that this process has in hand for callers and jobs, and that they are not too many.

One budget for all of them: bodies that are read, images while they are decoded, references that
requests hold, and those of jobs. Who finds no room is refused; a job that was accepted waits for
room, and meanwhile nobody else comes in.
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
    """Bytes of the budget that somebody holds. Released once, however often that is said."""

    def __init__(self, held: "MemoryBudget", max_bytes: int) -> None:
        self.num_bytes = 0
        self._held = held
        self._max_bytes = max_bytes
        self.is_released = False

    def grow(self, num_bytes: int) -> None:
        """Hold so many more. Raises Overloaded, and then holds what it held before."""
        self._held.take(self, num_bytes, self._max_bytes)

    def release(self) -> None:
        """Hold nothing any more, and never again."""
        self._held.give_back(self)

    def hold_with(self, value: T) -> T:
        """Hold it for as long as anybody holds `value`."""
        weakref.finalize(value, self.release).atexit = False
        return value


class Waiter:
    """Somebody who waits for room in a loop of its own; woken from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Let it look again."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._woken.set)

    async def wait(self) -> None:
        """Return at the next wake."""
        await self._woken.wait()
        self._woken.clear()


class MemoryBudget:
    """The budget. Called from the event loop and from threads that decode."""

    def __init__(self) -> None:
        self.num_bytes = 0
        # A raster may end anywhere, even in the middle of this.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self.num_work_bytes = 0
        self._waiters: deque[Waiter] = deque()

    def check_room(self, num_bytes: int, max_bytes: int) -> None:
        """Raise Overloaded if somebody waits, or if whoever comes in would find no room."""
        with self._lock:
            if self._waiters or self.num_bytes + num_bytes > max_bytes:
                raise Overloaded(FULL, None, BUDGET_RETRY_AFTER_S)

    def share(self, max_bytes: int) -> Share:
        """Return a share that holds nothing yet; all shares together hold at most `max_bytes`."""
        return Share(self, max_bytes)

    def add(self, value: T, num_bytes: int, max_bytes: int) -> T:
        """Hold so many bytes for as long as anybody holds `value`. Raises Overloaded."""
        share = self.share(max_bytes)
        share.grow(num_bytes)
        return share.hold_with(value)

    @contextmanager
    def working(self, num_bytes: int, max_bytes: int) -> Iterator[None]:
        """Hold so many bytes meanwhile, as soon as there is room among those who work.

        They have `max_bytes` of their own: what is kept waits for them, and would never go. Called
        from threads only. More than that are let in when nobody else works.
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
        """Wait until there is room for so many bytes, and hold them.

        More than all that there may be are let in when nobody else holds any.
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
        """Add to the share, unless it was released. Raises Overloaded where there is no room."""
        with self._lock:
            if share.is_released:
                return
            if self.num_bytes + num_bytes > max_bytes:
                raise Overloaded(FULL, None, BUDGET_RETRY_AFTER_S)
            self._add(share, num_bytes)

    def give_back(self, share: Share) -> None:
        """Take all that the share holds out of the budget."""
        with self._lock:
            share.is_released = True
            num_bytes, share.num_bytes = share.num_bytes, 0
            self.num_bytes -= num_bytes
            if num_bytes:
                self._wake_first()

    def _can_work(self, num_bytes: int, max_bytes: int) -> bool:
        return not self.num_work_bytes or self.num_work_bytes + num_bytes <= max_bytes

    def _let_in(self, waiter: Waiter, share: Share, num_bytes: int, max_bytes: int) -> bool:
        with self._lock:
            has_room = self.num_bytes == 0 or self.num_bytes + num_bytes <= max_bytes
            if self._waiters[0] is not waiter or not has_room:
                return False
            self._waiters.popleft()
            self._add(share, num_bytes)
            self._wake_first()
            return True

    def _leave(self, waiter: Waiter) -> None:
        with self._lock:
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
