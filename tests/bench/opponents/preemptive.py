"""How well a scheduler would do that preempts and moves work at no cost: an estimate, no bound."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flux_ray.simulator.outcome import Arrival

SAME_S = 1e-7


@dataclass(frozen=True)
class Attained:
    """The share of the requests that met their deadline; and weighted by GPU seconds."""

    by_requests: float
    by_gpu_seconds: float


@dataclass(slots=True, eq=False)
class PreemptiveJob:
    """What is left of an arrival."""

    deadline: float
    cost_s: float
    left_s: float

    def urgent_at(self) -> float:
        """From then on it must run without a pause."""
        return self.deadline - self.left_s


# Whom to give up first: the largest value.
RULES: tuple[Callable[[PreemptiveJob], float], ...] = (
    lambda job: job.left_s,
    lambda job: job.cost_s,
    lambda job: job.left_s / job.cost_s,
)


def preemptive_estimate(arrivals: Sequence[Arrival], num_replicas: int) -> Attained:
    """What preemption attains on one tier; for each of the two the best of three schedules.

    The earliest deadlines run, except that a request that can pause no longer goes first (EDZL;
    Lee 1994). When more of those come together than there are replicas, somebody is given up: the
    one with the most left to do, the longest, or the one of which least is done. Knowing nothing of
    the future costs it little, since it can always change its mind. The proven bound
    is in fluid.py.
    """
    results = [Preemptive(num_replicas, rule).run(arrivals) for rule in RULES]
    return Attained(
        max(result.by_requests for result in results),
        max(result.by_gpu_seconds for result in results),
    )


class Preemptive:
    """One schedule."""

    def __init__(self, num_replicas: int, rule: Callable[[PreemptiveJob], float]) -> None:
        self._num_replicas = num_replicas
        self._rule = rule
        self._jobs: list[PreemptiveJob] = []
        self._now = 0.0
        self._num_met = 0
        self._met_s = 0.0

    def run(self, arrivals: Sequence[Arrival]) -> Attained:
        """All of them, to the end."""
        for arrival in arrivals:
            self._advance(arrival.at_s)
            if arrival.deadline_s >= arrival.cost_s:
                deadline = arrival.at_s + arrival.deadline_s
                self._jobs.append(PreemptiveJob(deadline, arrival.cost_s, arrival.cost_s))
        self._advance(math.inf)
        total_s = sum(arrival.cost_s for arrival in arrivals)
        return Attained(self._num_met / len(arrivals), self._met_s / total_s)

    def _advance(self, until: float) -> None:
        while self._jobs and self._now < until:
            running, pausing = self._choose()
            ends = [self._now + job.left_s for job in running]
            end = min(until, *ends, *(job.urgent_at() for job in pausing))
            step_s = max(end - self._now, SAME_S)
            for job in running:
                job.left_s -= step_s
            self._now += step_s
            self._jobs = [job for job in self._jobs if not self._is_done(job)]
        self._now = max(self._now, until)

    def _choose(self) -> tuple[list[PreemptiveJob], list[PreemptiveJob]]:
        """Who runs now, and who pauses."""
        soon = self._now + SAME_S
        while True:
            urgent = [job for job in self._jobs if job.urgent_at() <= soon]
            if len(urgent) <= self._num_replicas:
                break
            self._jobs.remove(max(urgent, key=self._rule))
        self._jobs.sort(key=lambda job: (job.urgent_at() > soon, job.deadline))
        return self._jobs[: self._num_replicas], self._jobs[self._num_replicas :]

    def _is_done(self, job: PreemptiveJob) -> bool:
        if job.left_s > SAME_S:
            return False
        self._num_met += 1
        self._met_s += job.cost_s
        return True
