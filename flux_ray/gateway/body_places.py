"""Places for bodies that are being read: so many in all, and so many of one caller."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flux_ray.errors import GatewayFull, RateLimited

AGAIN_S = 1


class CallersBodies:
    """The bodies of one caller: those that are being read, and those that wait for that."""

    def __init__(self, max_at_once: int) -> None:
        self.num_in = 0
        self.turns = asyncio.Semaphore(max_at_once)


class BodyPlaces:
    """Has `num_places`, of which one caller may take half: a burst of small bodies is soon read.

    Called from the event loop.
    """

    def __init__(self, num_places: int, wait_s: float) -> None:
        self.num_places = num_places
        self.wait_s = wait_s
        self._num_taken = 0
        self._callers: dict[str, CallersBodies] = {}

    @asynccontextmanager
    async def place(self, caller: str, max_at_once: int) -> AsyncIterator[None]:
        """Hold a place within: as soon as fewer than `max_at_once` of the caller's are being read.

        RateLimited where these are too many for too long, GatewayFull where there is no place.
        """
        bodies = self._enter(caller, max_at_once)
        try:
            try:
                async with asyncio.timeout(self.wait_s):
                    await bodies.turns.acquire()
            except TimeoutError:
                raise too_many(max_at_once) from None
            try:
                yield
            finally:
                bodies.turns.release()
        finally:
            self._leave(caller, bodies)

    def _enter(self, caller: str, max_at_once: int) -> CallersBodies:
        if self._num_taken >= self.num_places:
            raise GatewayFull("this gateway reads as many bodies as it may: come back in a moment")
        bodies = self._callers.get(caller) or CallersBodies(max_at_once)
        if bodies.num_in >= max(max_at_once, self.num_places // 2):
            raise too_many(max_at_once)
        self._callers[caller] = bodies
        bodies.num_in += 1
        self._num_taken += 1
        return bodies

    def _leave(self, caller: str, bodies: CallersBodies) -> None:
        self._num_taken -= 1
        bodies.num_in -= 1
        if not bodies.num_in:
            del self._callers[caller]


def too_many(max_at_once: int) -> RateLimited:
    """Whose bodies they are need not be said: a key's, or an address's."""
    return RateLimited(
        f"{max_at_once} bodies of yours are being read, which is as many as may be at once:"
        " come back in a moment",
        None,
        AGAIN_S,
        max_at_once,
        0,
    )
