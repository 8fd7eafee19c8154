"""Find processes that have given no sign of life for too long.

`Liveness` does the counting, and is told the time; `Watch` asks many processes, each in a task of
its own. Both leave out the time in which the watching process itself stood still.
"""

import asyncio
import contextlib
import contextvars
import logging
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("ray.serve")

# How often a watcher looks for silent ones, and how long after an answer it asks again.
LOOK_S = 1.0
ASK_S = 2.0

Ask = Callable[[], Awaitable[object]]


class NextSign(NamedTuple):
    """An answer that says how long the next sign of life may take, where it is not the usual."""

    within_s: float


class Liveness:
    """The last sign of life by name, and who is silent. Only names heard or expected count.

    Time in which the watcher itself stood still is left out; otherwise all others would seem to
    hang after a machine was suspended or starved. So between two looks at most two periods count.
    """

    def __init__(self, limit_s: float, look_s: float) -> None:
        self._limit_s = limit_s
        self._look_s = look_s
        self._looked_at: float | None = None
        self._awake_s = 0.0
        # By name: when it was heard, and how long it may be silent since then.
        self._heard: dict[str, tuple[float, float]] = {}

    def hear(self, name: str, limit_s: float | None = None) -> None:
        """Note a sign of life, and for how many seconds there may be no other."""
        self._heard[name] = self._awake_s, self._limit_s if limit_s is None else limit_s

    def expect(self, name: str, within_s: float | None = None) -> None:
        """Count the silence of `name`, even if it was never heard, by the usual limit or this one.

        It counts from now on, unless it counts by such a limit already.
        """
        limit_s = self._limit_s if within_s is None else within_s
        _, present_s = self._heard.get(name, (0.0, math.inf))
        if present_s > limit_s:
            self._heard[name] = self._awake_s, limit_s

    @property
    def awake_s(self) -> float:
        """For how long the watcher has been watching, as of its last look."""
        return self._awake_s

    def forget(self, name: str) -> None:
        """Stop counting the silence of `name`."""
        self._heard.pop(name, None)

    def look(self, now: float) -> list[str]:
        """Return the names that have been silent for longer than the limit."""
        passed_s = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        self._awake_s += min(passed_s, 2 * self._look_s)
        heard = list(self._heard.items())
        return [name for name, (at_s, limit_s) in heard if self._awake_s - at_s > limit_s]


class Watch:
    """A watch over many processes: each is asked again and again until it is dead or hangs.

    Used from the event loop of the process that watches.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._liveness = Liveness(limit_s, LOOK_S)
        self._clock = clock
        self._asking: dict[str, asyncio.Task[None]] = {}
        # By name: when the question that is not answered yet was asked, as `awake_s`.
        self._asked_at_s: dict[str, float] = {}

    @property
    def names(self) -> frozenset[str]:
        """The names of the processes that are asked."""
        return frozenset(self._asking)

    def follow(self, name: str, ask: Ask) -> None:
        """Ask a process from now on; `ask` returns when it has answered, raises if it is dead."""
        # In an empty context: otherwise Ray would cancel it with the request that started it.
        asking = asyncio.get_running_loop().create_task(
            self._ask(name, ask), context=contextvars.Context()
        )
        self._asking[name] = asking
        asking.add_done_callback(lambda asked: self._stop_asking(name, asked))

    def expect(self, name: str, within_s: float | None = None) -> None:
        """Count its silence from now on; that of others counts only from their first answer.

        A process that is still starting may take minutes to answer, and must not be killed for it.
        """
        self._liveness.expect(name, within_s)

    def hung(self) -> list[str]:
        """Return the names of those that hang, each once; call this every `LOOK_S`."""
        silent = self._liveness.look(self._clock())
        for name in silent:
            self.leave(name)
        return silent

    def unanswered_s(self, name: str) -> float:
        """Return for how long it has not answered a question, as of the last call of `hung`."""
        awake_s = self._liveness.awake_s
        return awake_s - self._asked_at_s.get(name, awake_s)

    def leave(self, name: str) -> None:
        """Ask a process no more, since it is ended."""
        self._asking[name].cancel()
        self._forget(name)

    async def _ask(self, name: str, ask: Ask) -> None:
        while True:
            self._asked_at_s[name] = self._liveness.awake_s
            answer = await ask()
            del self._asked_at_s[name]
            limit_s = answer.within_s if isinstance(answer, NextSign) else None
            self._liveness.hear(name, limit_s)
            await asyncio.sleep(ASK_S)

    def _stop_asking(self, name: str, asked: "asyncio.Task[None]") -> None:
        if not asked.cancelled():
            logger.info("%s is asked for signs of life no more: %s", name, asked.exception())
        self._asking.pop(name, None)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._asked_at_s.pop(name, None)
        self._liveness.forget(name)


def stands_still(pid: int, over_s: float, min_age_s: float = 0.0) -> bool:
    """Look at a process of this machine for so long: return whether it computes nothing at all.

    One that waits for a disk may only be slow, and one that is younger than `min_age_s` is loading.
    Without Linux's /proc nobody is said to stand still.
    """
    before = used_by(pid, min_age_s)
    time.sleep(over_s)
    return before is not None and used_by(pid) == before


def used_by(pid: int, min_age_s: float = 0.0) -> str | None:
    """Return what a process has used of its processors; None if it is not stopped or asleep."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    # Behind the program's name, which is in brackets and may contain anything.
    fields = told.rpartition(")")[2].split()
    age_s = up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return " ".join(fields[11:13]) if fields[0] in "TtS" and age_s >= min_age_s else None


def end_process(pid: int) -> None:
    """End a process of this machine by SIGKILL, which it need not hear. Harmless if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
