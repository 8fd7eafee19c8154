"""Time the stages of a rank's call, by the host's clock or by events on the GPU.

`Launched` is a call whose stages are still in the GPU's queue, with its timer. `follows` says which
calls may be queued behind it.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from flux_ray.replica.transport import StageFailed
from flux_ray.stages import StageAnswer

if TYPE_CHECKING:
    from torch.cuda import Event

# The shortest time that is reported: a stage that gave the GPU nothing to do would have 0 seconds,
# and `stretched` in rank_group.py divides by their sum.
MIN_S = 1e-6


class Timer(Protocol):
    """A clock for the stages of one call: marked between them, and read once after the last."""

    def mark(self) -> None:
        """Mark the end of a stage and the beginning of the next one."""

    def is_done(self) -> bool:
        """Return whether the last stage is done, without waiting for it."""

    def laps_s(self) -> list[float]:
        """Wait until the last stage is done, and return the seconds that each one took."""


class HostTimer:
    """A timer for stages that are done when they return, as on the CPU."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """Mark the present time, when the stage before it is done."""
        self._marks.append(time.perf_counter())

    def is_done(self) -> bool:
        """Return True: stages on the CPU are done when they return."""
        return True

    def laps_s(self) -> list[float]:
        """Return the seconds between marks."""
        return [max(MIN_S, after - before) for before, after in pairwise(self._marks)]


class GpuTimer:
    """A timer for stages that return when their kernels are queued on the GPU.

    Its marks are CUDA events in the same queue. Waiting for the GPU after every stage would time
    them too, but leave it idle until the next stage's first kernels arrive.
    """

    def __init__(self) -> None:
        self._marks: list[Event] = []

    def mark(self) -> None:
        """Queue an event that gets the time when the GPU reaches this place in its queue."""
        from torch.cuda import Event

        event = Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def is_done(self) -> bool:
        """Return whether the GPU has reached the last mark."""
        return bool(self._marks[-1].query())  # type: ignore[no-untyped-call]

    def laps_s(self) -> list[float]:
        """Wait for the GPU and return the seconds between marks; raise the error of a kernel."""
        self._marks[-1].synchronize()
        return [
            max(MIN_S, before.elapsed_time(after) / 1e3) for before, after in pairwise(self._marks)
        ]


class Launched:
    """A call whose stages are in the GPU's queue: a `transport.Underway`, answered later."""

    def __init__(
        self, values: list[object], timer: Timer, describe: Callable[[Exception], str]
    ) -> None:
        self._values = values
        self._timer = timer
        self._describe = describe

    def is_done(self) -> bool:
        """Return whether the GPU has done all stages."""
        return self._timer.is_done()

    def answers(self) -> list[StageAnswer]:
        """Wait for the GPU and return an answer for each stage; raise a kernel's error as it is."""
        laps_s = self._timer.laps_s()
        return [StageAnswer(*each) for each in zip(self._values, laps_s, strict=True)]

    def outcome(self) -> list[StageAnswer]:
        """Return the answers as `answers` does, but raise a kernel's error as StageFailed."""
        try:
            return self.answers()
        except Exception as error:
            raise StageFailed(self._describe(error)) from error


def follows(job: int, stages: tuple[str, ...], *payload: object) -> bool:
    """Return whether a call may begin before the GPU has done the one before it.

    Calls of denoise steps may, since they only queue kernels. Other stages wait for the GPU while
    they run, and the answer to the call before them would be late by that.
    """
    return set(stages) == {"denoise"}
