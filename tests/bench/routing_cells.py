"""The cells of the routing bench: its work, its policies, and what each attains in a cell."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.simulator.fleet import simulate
from flux_ray.simulator.outcome import Arrival, QueuePolicy, ReplicaPool, TierOutcome
from tests.bench.opponents.fluid import preemptive_bound
from tests.bench.opponents.preemptive import Attained, preemptive_estimate
from tests.bench.opponents.routers import (
    EarlyBinding,
    Fifo,
    least_requests,
    least_work,
    power_of_two,
    round_robin,
)

LOADS = (0.6, 0.8, 0.95, 1.2)
SCALES = (1.2, 2.0, 3.0)
SHARES = (0.7, 0.2, 0.1)


@dataclass(frozen=True)
class Work:
    """A tier of the bench: its replicas, and the seconds of small, middle and large requests."""

    tier: str
    num_replicas: int
    costs_s: tuple[float, float, float]

    @property
    def mean_s(self) -> float:
        """Return the mean seconds of a request."""
        return sum(share * cost for share, cost in zip(SHARES, self.costs_s, strict=True))


DEV = Work("dev", 8, (4.0, 9.0, 25.0))
KLEIN = Work("klein", 16, (0.6, 1.3, 3.5))
WORKS = (DEV, KLEIN)


@dataclass(frozen=True)
class Cell:
    """A cell: the load as a share of the capacity, and deadlines of `scale` unloaded latencies."""

    scale: float
    load: float


def arrivals_of(work: Work, cell: Cell, num: int, seed: int, noise: float = 0.0) -> list[Arrival]:
    """Return Poisson arrivals; the router's estimates are off by a lognormal factor with `noise`.

    Deadlines are multiples of the true seconds.
    """
    dice = random.Random(f"{work.tier} {seed}")
    errors = random.Random(f"{work.tier} {seed} errors")
    made = []
    now = 0.0
    for _ in range(num):
        now += dice.expovariate(cell.load * work.num_replicas / work.mean_s)
        actual_s = dice.choices(work.costs_s, SHARES)[0]
        estimate_s = actual_s * errors.lognormvariate(0.0, noise) if noise else actual_s
        made.append(Arrival(now, work.tier, estimate_s, cell.scale * actual_s, actual_s=actual_s))
    return made


NewPolicy = Callable[[], QueuePolicy]
OURS: NewPolicy = TierQueue
UNBOUNDED: dict[str, NewPolicy] = {
    "round_robin": lambda: EarlyBinding(round_robin()),
    "power_of_two": lambda: EarlyBinding(power_of_two()),
    "least_requests": lambda: EarlyBinding(least_requests()),
    "least_work": lambda: EarlyBinding(least_work()),
    "fifo": Fifo,
}
REQUESTS_AT_REPLICA = (1, 2, 3, 4, 5, 6, 8, 12)
REQUESTS_PER_REPLICA_IN_LINE = (0, 0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.25, 1.5, 2, 3)
# Bounds on the predicted wait, as multiples of a mean request's seconds.
WAITS = (
    0,
    *(0.02 * step for step in range(1, 16)),
    *(0.4 + 0.1 * step for step in range(12)),
    2,
    3,
)


def bounded(name: str, work: Work) -> Iterator[NewPolicy]:
    """Yield the policy of that name with each queue bound of its grid."""
    choices = {
        "round_robin": round_robin,
        "power_of_two": power_of_two,
        "least_requests": least_requests,
    }
    if name in choices:
        for bound in REQUESTS_AT_REPLICA:
            yield lambda bound=bound: EarlyBinding(choices[name](), bound_requests=bound)
    elif name == "fifo":
        for share in REQUESTS_PER_REPLICA_IN_LINE:
            bound = round(share * work.num_replicas)
            yield lambda bound=bound: Fifo(bound_requests=bound)
    else:
        # This also stands for a single queue with a bound on the predicted wait: both start the
        # requests that they accept in order of arrival, on whichever replica is free first.
        for wait in WAITS:
            bound_s = wait * work.mean_s
            yield lambda bound_s=bound_s: EarlyBinding(least_work(), bound_s=bound_s)


def attained(
    work: Work,
    streams: Sequence[list[Arrival]],
    new_policy: NewPolicy,
    report_period_s: float | None = None,
) -> Attained:
    """Return a policy's mean attainment over all streams."""
    outcomes: list[TierOutcome] = []
    for stream in streams:
        pool = ReplicaPool(
            work.tier, new_policy(), work.num_replicas, report_period_s=report_period_s
        )
        outcomes.append(simulate(stream, [pool]).tiers[work.tier])
    # GPU seconds are the estimated ones, by which requests are priced.
    return Attained(
        math.fsum(outcome.attainment for outcome in outcomes) / len(outcomes),
        math.fsum(outcome.attainment_by_gpu_seconds for outcome in outcomes) / len(outcomes),
    )


def best(results: Sequence[Attained]) -> Attained:
    """Return the best of each of the two measures, which may be those of different bounds."""
    return Attained(
        max(result.by_requests for result in results),
        max(result.by_gpu_seconds for result in results),
    )


def mean(results: Sequence[Attained]) -> Attained:
    """Return the mean over tiers or streams, each with the same weight."""
    return Attained(
        math.fsum(result.by_requests for result in results) / len(results),
        math.fsum(result.by_gpu_seconds for result in results) / len(results),
    )


def cell_results(work: Work, cell: Cell, num: int, seeds: Sequence[int]) -> dict[str, Attained]:
    """Return every policy's attainment in a cell; `NAME+bound` is with the best bound for it."""
    streams = [arrivals_of(work, cell, num, seed) for seed in seeds]
    results = {"ours": attained(work, streams, OURS)}
    for name, new_policy in UNBOUNDED.items():
        results[name] = attained(work, streams, new_policy)
        grid = [attained(work, streams, policy) for policy in bounded(name, work)]
        results[f"{name}+bound"] = best([results[name], *grid])
    counting = ["round_robin", "power_of_two", "least_requests", "fifo"]
    results["best_bounded_counting"] = best([results[f"{name}+bound"] for name in counting])
    results["best_bounded"] = best([results[f"{name}+bound"] for name in UNBOUNDED])
    for name, judge in (("estimate", preemptive_estimate), ("bound", preemptive_bound)):
        results[f"preemptive_{name}"] = mean(
            [judge(stream, work.num_replicas) for stream in streams]
        )
    return results
