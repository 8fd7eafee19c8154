"""Who has given no sign of life for too long, while whoever watches was awake itself."""

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable

logger = logging.getLogger("ray.serve")

# A watcher looks so often, and asks again so long after an answer.
LOOK_S = 1.0
ASK_S = 2.0

Ask = Callable[[], Awaitable[object]]


class Liveness:
    """Signs of life by name. Only those are missed who gave one before, or were expected to.

    Time in which the watcher itself stood still counts for nobody: on a machine that was suspended,
    or starved, all others would seem to hang. From one look to the next count two of its periods at
    most.
    """

    def __init__(self, limit_s: float, look_s: float) -> None:
        self._limit_s = limit_s
        self._look_s = look_s
        self._looked_at: float | None = None
        self._awake_s = 0.0
        self._heard: dict[str, float] = {}

    def hear(self, name: str) -> None:
        """It lives."""
        self._heard[name] = self._awake_s

    def expect(self, name: str) -> None:
        """Miss it from now on, though it may not have been heard yet."""
        self._heard.setdefault(name, self._awake_s)

    def forget(self, name: str) -> None:
        """Miss it no more."""
        self._heard.pop(name, None)

    def look(self, now: float) -> list[str]:
        """Those that were not heard for longer than the limit."""
        passed_s = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        self._awake_s += min(passed_s, 2 * self._look_s)
        heard = list(self._heard.items())
        return [name for name, at_s in heard if self._awake_s - at_s > self._limit_s]


class Watch:
    """Asks each of many for signs of life, again and again, until it is dead or has to be ended."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._liveness = Liveness(limit_s, LOOK_S)
        self._clock = clock
        self._asking: dict[str, asyncio.Task[None]] = {}

    @property
    def names(self) -> frozenset[str]:
        """Of those that are asked."""
        return frozenset(self._asking)

    def follow(self, name: str, ask: Ask) -> None:
        """Ask it from now on. `ask` returns with its answer, and raises when it is dead."""
        # Of no request: Ray would end it with the one that it was begun in.
        asking = asyncio.get_running_loop().create_task(
            self._ask(name, ask), context=contextvars.Context()
        )
        self._asking[name] = asking
        asking.add_done_callback(lambda asked: self._bury(name, asked))

    def expect(self, name: str) -> None:
        """Miss it from now on. Others, which may be starting, are as soon as they answered once."""
        self._liveness.expect(name)

    def hung(self) -> list[str]:
        """Those that hang; each is named once. To be called every `LOOK_S`."""
        silent = self._liveness.look(self._clock())
        for name in silent:
            self._asking[name].cancel()
            self._liveness.forget(name)
        return silent

    async def _ask(self, name: str, ask: Ask) -> None:
        while True:
            await ask()
            self._liveness.hear(name)
            await asyncio.sleep(ASK_S)

    def _bury(self, name: str, asked: "asyncio.Task[None]") -> None:
        if not asked.cancelled():
            logger.info("%s is asked for signs of life no more: %s", name, asked.exception())
        self._asking.pop(name, None)
        self._liveness.forget(name)
