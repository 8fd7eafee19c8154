"""What each stage of a call takes, by the processor's clock or the card's own, and its answer."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from flux_ray.replica.transport import StageFailed
from flux_ray.request import StageAnswer

if TYPE_CHECKING:
    from torch.cuda import Event

# A stage that gave the card nothing to do still took time: what is told is divided by it.
MIN_S = 1e-6


class Timer(Protocol):
    """Marks between the stages of a call; what lies between them is read once, at its end."""

    def mark(self) -> None:
        """A stage ends here, and the next one begins."""

    def is_done(self) -> bool:
        """Whether the last stage is done."""

    def laps_s(self) -> list[float]:
        """Return what each stage took, when the last one is done."""


class HostTimer:
    """Of stages that are done when they return."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """Now."""
        self._marks.append(time.perf_counter())

    def is_done(self) -> bool:
        """They are."""
        return True

    def laps_s(self) -> list[float]:
        """Return the seconds between marks."""
        return [max(MIN_S, after - before) for before, after in pairwise(self._marks)]


class GpuTimer:
    """Of stages that return when their kernels are queued: marks are events in the same queue.

    To wait for the card after every stage would time them as well, but then it has nothing to do
    until the next stage's first kernels arrive.
    """

    def __init__(self) -> None:
        self._marks: list[Event] = []

    def mark(self) -> None:
        """When the card comes to this place in its queue."""
        from torch.cuda import Event

        event = Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def is_done(self) -> bool:
        """Whether the card has come to the last mark."""
        return bool(self._marks[-1].query())  # type: ignore[no-untyped-call]

    def laps_s(self) -> list[float]:
        """Return the seconds between marks; an error of a kernel comes out here."""
        self._marks[-1].synchronize()
        return [
            max(MIN_S, before.elapsed_time(after) / 1e3) for before, after in pairwise(self._marks)
        ]


class Launched:
    """Stages of one call that are in the card's queue: its answer is under way."""

    def __init__(
        self, values: list[object], timer: Timer, describe: Callable[[Exception], str]
    ) -> None:
        self._values = values
        self._timer = timer
        self._describe = describe

    def is_done(self) -> bool:
        """Whether the card has done them."""
        return self._timer.is_done()

    def answers(self) -> list[StageAnswer]:
        """Wait for the card."""
        laps_s = self._timer.laps_s()
        return [StageAnswer(*each) for each in zip(self._values, laps_s, strict=True)]

    def outcome(self) -> list[StageAnswer]:
        """The same; what a kernel did wrong is raised as StageFailed."""
        try:
            return self.answers()
        except Exception as error:
            raise StageFailed(self._describe(error)) from error


def follows(job: int, stages: tuple[str, ...], *payload: object) -> bool:
    """Whether a call may be begun before the card has done the former one.

    Steps may, which only queue kernels. The other stages wait for the card on their way, and the
    answer to the former call would wait with them.
    """
    return set(stages) == {"denoise"}
