"""What each stage of a call takes: by the processor's clock, or by the card's own."""

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.cuda import Event

# A stage that gave the card nothing to do still took time: what is told is divided by it.
MIN_S = 1e-6


class Timer(Protocol):
    """Marks between the stages of a call; what lies between them is read once, at its end."""

    def mark(self) -> None:
        """A stage ends here, and the next one begins."""

    def laps_s(self) -> list[float]:
        """Return what each stage took, when the last one is done."""


class HostTimer:
    """Of stages that are done when they return."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """Now."""
        self._marks.append(time.perf_counter())

    def laps_s(self) -> list[float]:
        """Return the seconds between marks."""
        return [max(MIN_S, after - before) for before, after in pairwise(self._marks)]


class CardTimer:
    """Of stages that return when their kernels are queued: marks are events in the same queue.

    To wait for the card after every stage would time them as well, but then it has nothing to do
    until the next stage's first kernels arrive.
    """

    def __init__(self) -> None:
        self._marks: list[Event] = []

    def mark(self) -> None:
        """When the card comes to this place in its queue."""
        from torch.cuda import Event

        event = Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def laps_s(self) -> list[float]:
        """Return the seconds between marks; an error of a kernel comes out here."""
        self._marks[-1].synchronize()
        return [
            max(MIN_S, before.elapsed_time(after) / 1e3) for before, after in pairwise(self._marks)
        ]
