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

    def stop(self) -> None:
        """Ask nobody any more."""
        for name in self.names:
            self.leave(name)

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


class ProcessStat(NamedTuple):
    """What a process looks like.

    `began`: when it began, in clock ticks since its machine did. `used`: its processor time.
    `is_idle`: it is stopped or sleeps.
    """

    began: int
    used: str
    is_idle: bool


def stands_still(pid: int, over_s: float, min_age_s: float = 0.0) -> int | None:
    """Look at a process of this machine for so long: return its `began` if it computes nothing.

    Return None if it does. One that waits for a disk may only be slow, and one that is younger than
    `min_age_s` is loading. Without Linux's /proc nobody is said to stand still.
    """
    before = stat_of(pid)
    time.sleep(over_s)
    if before is None or not before.is_idle or stat_of(pid) != before:
        return None
    return before.began if age_s(before) >= min_age_s else None


def stat_of(pid: int) -> ProcessStat | None:
    """Return what a process looks like now; None if there is none, or no /proc."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # Behind the program's name, which is in brackets and may contain anything.
    fields = told.rpartition(")")[2].split()
    return ProcessStat(int(fields[19]), " ".join(fields[11:13]), fields[0] in "TtS")


def age_s(process: ProcessStat) -> float:
    """Return for how many seconds a process of this machine has lived."""
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return up_s - process.began / os.sysconf("SC_CLK_TCK")


def end_process(pid: int, began: int) -> None:
    """End a process that stands still by SIGKILL, which it need not hear.

    Harmless if it is gone: another process of the same `pid` began at another time.
    """
    now = stat_of(pid)
    if now is not None and now.began == began:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
