"""What a scaling policy sees of a tier, and what it must answer."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ScalingState:
    """A tier at one moment; seconds are GPU seconds on one replica.

    `current` replicas are up, `starting` ones are in their cold start; `arrived_s` arrived since
    the last call, refused or not. `waiting_s` is None while nobody knows.
    """

    now: float
    current: int
    starting: int
    waiting_s: float | None
    running_s: float
    arrived_s: float
    min_replicas: int
    max_replicas: int


def target_of(state: ScalingState) -> int:
    """What was asked for last: those that are up, and those that will be."""
    return state.current + state.starting


class Scaling(Protocol):
    """How many replicas a tier should have; asked every period."""

    def replicas(self, state: ScalingState) -> int:
        """The number wanted, those that are starting included."""
