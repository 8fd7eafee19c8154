"""A scaling plan made beforehand, and the search for the cheapest one: the oracle of a trace."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flux_ray.router.autoscaling.scaler import ScalingState
from flux_ray.simulator.outcome import Arrival

SLOT_S = 30.0
# Slots are changed together, a quarter as many each time, from half of them all down to one.
FACTOR = 4
# The search ends when a round of it saves less than this part of the GPU hours.
LEAST_SAVING = 0.005
MOST_SHARE = 16.0


@dataclass(frozen=True)
class Schedule:
    """Replicas that must be up in each slot of time, ordered a cold start before they must.

    One that would be needed again within a cold start is kept: starting it anew costs as much.
    """

    needs: tuple[int, ...]
    cold_start_s: float
    slot_s: float = SLOT_S

    def replicas(self, state: ScalingState) -> int:
        """The most that will be needed until a replica ordered now is up."""
        first = self._slot(state.now)
        last = self._slot(state.now + self.cold_start_s)
        wanted = max(self.needs[first : last + 1])
        return min(max(wanted, state.min_replicas), state.max_replicas)

    def _slot(self, at_s: float) -> int:
        return min(int(at_s / self.slot_s), len(self.needs) - 1)


@dataclass(frozen=True)
class Trial:
    """What a schedule achieves."""

    attainment: float
    gpu_hours: float


def demand_of(
    arrivals: Iterable[Arrival], duration_s: float, slot_s: float = SLOT_S
) -> list[float]:
    """Replicas' worth of work that arrives in each slot."""
    slots = [0.0] * math.ceil(duration_s / slot_s)
    for arrival in arrivals:
        slots[min(int(arrival.at_s / slot_s), len(slots) - 1)] += arrival.cost_s / slot_s
    return slots


def cheapest(
    demand: Sequence[float],
    cold_start_s: float,
    attainment: float,
    attempt: Callable[[Schedule], Trial],
) -> tuple[Schedule, Trial]:
    """The fewest GPU hours found that attain as much: an oracle, for it tries them on the trace.

    Replicas in proportion to the demand of each slot, as few as attain it; then, as long as it is
    still attained, one replica less in halves of the time, eighths, ... and single slots, again and
    again until that saves next to nothing. No proof of the least, but the schedule that it returns
    does what is said of it. ValueError if no number of replicas attains it.
    """
    share = 0.5
    schedule = in_proportion(demand, share, cold_start_s)
    best = attempt(schedule)
    while best.attainment < attainment:
        share *= 1.1
        if share > MOST_SHARE:
            raise ValueError(f"no schedule attains {attainment:.3f}")
        schedule = in_proportion(demand, share, cold_start_s)
        best = attempt(schedule)
    before = float("inf")
    while best.gpu_hours < before * (1 - LEAST_SAVING):
        before = best.gpu_hours
        for first, length in places_of(len(demand)):
            less = lowered(schedule, first, length)
            trial = attempt(less) if less.needs != schedule.needs else best
            if trial.attainment >= attainment and trial.gpu_hours < best.gpu_hours:
                schedule, best = less, trial
    return schedule, best


def in_proportion(demand: Sequence[float], share: float, cold_start_s: float) -> Schedule:
    """Whole replicas for so much of the demand."""
    return Schedule(tuple(math.ceil(slot * share) for slot in demand), cold_start_s)


def places_of(num_slots: int) -> list[tuple[int, int]]:
    """First slot and how many of them, from halves to single ones."""
    places = []
    length = max(1, num_slots // 2)
    while True:
        places += [(first, length) for first in range(0, num_slots, length)]
        if length == 1:
            return places
        length = max(1, length // FACTOR)


def lowered(schedule: Schedule, first: int, length: int) -> Schedule:
    """One replica less in these slots."""
    needs = list(schedule.needs)
    for slot in range(first, min(first + length, len(needs))):
        needs[slot] = max(0, needs[slot] - 1)
    return Schedule(tuple(needs), schedule.cold_start_s, schedule.slot_s)
