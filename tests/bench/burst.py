"""Simulate autoscaling through a burst: GPU hours of ours, of Serve's default and of an oracle.

The traffic is an hour of Poisson arrivals for two tiers, with two minutes of ten times as much in
the middle. All policies have the same queue, the same bounds and the same cold starts, which count
as GPU hours. Ours knows the mean cost of a request and the cold start, but nothing of the trace.
Serve's gets the cheapest of its settings that attains as much as ours, and sees the numbers of
every second without delay. The oracle tries its schedules on the trace itself. This takes five
minutes; the last line is one JSON object.
"""

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from flux_ray.router.autoscaling.scaler import Scaler, Scaling, ScalingRules
from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.simulator.fleet import simulate
from flux_ray.simulator.outcome import Arrival, ReplicaPool, TierOutcome
from flux_ray.simulator.traffic import burst
from tests.bench.opponents.counted import CountedQueue
from tests.bench.opponents.schedule import Trial, cheapest, demand_of
from tests.bench.opponents.serve_default import TUNED, ServeDefault, ServeSettings

DURATION_S = 3600.0
SEED = 1
SLO_SCALE = 2.0
MIN_REPLICAS, MAX_REPLICAS = 1, 128
WEIGHTS = (0.7, 0.2, 0.1)
HEADROOMS = (0.5, 0.0, 0.25, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
# The fields that Serve's documentation advises to tune, in the ranges that it gives.
SERVE_GRID = tuple(
    replace(TUNED, target_ongoing_requests=target, downscale_delay_s=down, aggregation_function=how)
    for target, down, how in itertools.product(
        (0.7, 1.0, 1.5), (30.0, 60.0, 120.0, 300.0), ("mean", "max")
    )
)

Policy = Callable[[CountedQueue], Scaling]


@dataclass(frozen=True)
class Tier:
    """A tier: the seconds of 70, 20 and 10 % of its requests, and how many replicas they occupy."""

    name: str
    costs_s: tuple[float, float, float]
    busy_replicas: float
    cold_start_s: float
    num_gpus: int

    @property
    def mean_s(self) -> float:
        return sum(cost * weight for cost, weight in zip(self.costs_s, WEIGHTS, strict=True))


# Eight replicas of each tier at 60 % load; klein-9b's requests have references and several images.
TIERS = (
    Tier("flux-2-dev", (4.0, 9.0, 25.0), 4.8, cold_start_s=60.0, num_gpus=2),
    Tier("flux-2-klein-9b", (1.0, 2.5, 5.0), 4.8, cold_start_s=20.0, num_gpus=1),
)


def arrivals_of(tier: Tier, slo_scale: float) -> list[Arrival]:
    """Return the arrivals of one tier in the hour."""
    rng = random.Random(f"{SEED} {tier.name}")
    costs = iter(lambda: rng.choices(tier.costs_s, WEIGHTS)[0], None)
    times = burst(tier.busy_replicas / tier.mean_s, DURATION_S, random.Random(SEED))
    return [
        Arrival(at_s, tier.name, cost, slo_scale * cost)
        for at_s, cost in zip(times, costs, strict=False)
    ]


def run(tier: Tier, arrivals: list[Arrival], policy: Policy) -> TierOutcome:
    """Simulate the hour under one policy."""
    queue = CountedQueue(TierQueue(cold_start_s=tier.cold_start_s))
    pool = ReplicaPool(
        tier.name,
        queue,
        num_replicas=8,
        num_gpus_per_replica=tier.num_gpus,
        cold_start_s=tier.cold_start_s,
        scaling=policy(queue),
        min_replicas=MIN_REPLICAS,
        max_replicas=MAX_REPLICAS,
    )
    return simulate(arrivals, [pool], horizon_s=DURATION_S).tiers[tier.name]


def ours(tier: Tier, slo_scale: float, headroom: float) -> Policy:
    """Return our policy, which knows the wait that a mean request can afford and the cold start."""
    rules = ScalingRules((slo_scale - 1) * tier.mean_s, tier.cold_start_s, headroom)
    return lambda queue: Scaler(rules)


def serves(settings: ServeSettings) -> Policy:
    """Return Serve's default policy with these settings."""
    return lambda queue: ServeDefault(settings, lambda: queue.num_ongoing)


@dataclass(frozen=True)
class Row:
    """The results of one policy on one tier."""

    tier: str
    policy: str
    attainment: float
    gpu_hours: float


def row_of(tier: Tier, policy: str, outcome: TierOutcome | Trial) -> Row:
    return Row(tier.name, policy, outcome.attainment, outcome.gpu_hours)


def cheapest_row(rows: list[Row], attainment: float) -> Row:
    """Return the cheapest row that attains so much, or the one that attains most if none does."""
    enough = [row for row in rows if row.attainment >= attainment]
    if enough:
        return min(enough, key=lambda row: row.gpu_hours)
    return max(rows, key=lambda row: row.attainment)


def oracle(tier: Tier, arrivals: list[Arrival], attainment: float) -> Row:
    """Return the cheapest schedule that attains so much, found by trying them on the hour."""

    def attempt(schedule: Scaling) -> Trial:
        outcome = run(tier, arrivals, lambda queue: schedule)
        return Trial(outcome.attainment, outcome.gpu_hours)

    demand = demand_of(arrivals, DURATION_S)
    return row_of(tier, "oracle", cheapest(demand, tier.cold_start_s, attainment, attempt)[1])


def compare(tier: Tier, slo_scale: float = SLO_SCALE) -> list[Row]:
    """Compare the policies: Serve's and the oracle at our attainment, then ours at Serve's."""
    arrivals = arrivals_of(tier, slo_scale)
    mine = [
        row_of(tier, f"headroom {headroom:g}", run(tier, arrivals, ours(tier, slo_scale, headroom)))
        for headroom in HEADROOMS
    ]
    tuned = [
        row_of(tier, describe(settings), run(tier, arrivals, serves(settings)))
        for settings in SERVE_GRID
    ]
    untuned = row_of(tier, "Serve, untuned", run(tier, arrivals, serves(ServeSettings())))
    advised = row_of(tier, "Serve, as advised", run(tier, arrivals, serves(TUNED)))
    first = mine[0]
    best = cheapest_row(tuned, first.attainment)
    beaten = sum(
        any(m.attainment >= row.attainment and m.gpu_hours < row.gpu_hours for m in mine)
        for row in tuned
    )
    return [
        replace(first, policy="ours"),
        replace(best, policy=f"Serve, best of {len(tuned)}: {best.policy}"),
        oracle(tier, arrivals, first.attainment),
        untuned,
        advised,
        replace(
            cheapest_row(mine, advised.attainment),
            policy="ours, attaining as much as Serve as advised",
        ),
        Row(tier.name, f"ours is cheaper and attains as much: {beaten} of {len(tuned)}", 0, 0),
    ]


def describe(settings: ServeSettings) -> str:
    """Return the settings that were tuned, in words."""
    return (
        f"target {settings.target_ongoing_requests:g}, down after {settings.downscale_delay_s:g} s,"
        f" {settings.aggregation_function}"
    )


def print_rows(rows: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table("tier", "policy", "attained", "GPU hours")
    for row in rows:
        numbers = (f"{row.attainment:.3f}", f"{row.gpu_hours:.2f}") if row.gpu_hours else ("", "")
        table.add_row(row.tier, row.policy, *numbers)
    Console(width=132).print(table)


def burst_figures(slo_scale: float = SLO_SCALE) -> dict[str, float]:
    """Return the GPU hours of all tiers for each policy, the others at our attainment."""
    hours = {"ours": 0.0, "serve_default": 0.0, "oracle": 0.0}
    rows = []
    for tier in TIERS:
        compared = compare(tier, slo_scale)
        rows += compared
        for name, row in zip(hours, compared, strict=False):
            hours[name] += row.gpu_hours
    print_rows(rows)
    return {name: round(value, 2) for name, value in hours.items()}


if __name__ == "__main__":
    print(json.dumps({"gpu_hours": burst_figures()}))
