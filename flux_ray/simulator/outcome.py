"""The values of a simulation: what goes in, and what comes out.

In go arrivals, outages and pools of replicas, each pool with a queue policy (`QueuePolicy`). Out
come counts, waits, GPU hours and a curve of the load over time (`Outcome`). Memory is bounded,
however long the trace is.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from flux_ray.router.autoscaling.scaler import Scaling
from flux_ray.router.queue import Assignment, QueuedRequest, RejectedEntry, Rejection

SMALLEST_WAIT_S = 0.001
BINS_PER_FACTOR_E = 50
NUM_BINS = 1 + round(BINS_PER_FACTOR_E * math.log(1e6 / SMALLEST_WAIT_S))
MAX_POINTS = 512


class Waits:
    """A histogram of waits, exact to one percent between a millisecond and eleven days."""

    def __init__(self) -> None:
        self.counts = [0] * NUM_BINS
        self.num = 0
        self.total_s = 0.0

    def add(self, wait_s: float) -> None:
        """Count one wait of so many seconds."""
        self.num += 1
        self.total_s += wait_s
        place = 0
        if wait_s > SMALLEST_WAIT_S:
            place = 1 + int(BINS_PER_FACTOR_E * math.log(wait_s / SMALLEST_WAIT_S))
        self.counts[min(place, NUM_BINS - 1)] += 1

    @property
    def mean_s(self) -> float:
        """The mean wait in seconds; 0 if there were none."""
        return self.total_s / self.num if self.num else 0.0

    def quantile(self, share: float) -> float:
        """Return the seconds that this share (0..1) of the waits stayed within; 0 without waits."""
        left = share * self.num
        for place, count in enumerate(self.counts):
            left -= count
            if count and left <= 0:
                if place == 0:
                    return 0.0
                return SMALLEST_WAIT_S * math.exp((place - 0.5) / BINS_PER_FACTOR_E)
        return 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """The load from `at_s` for `length_s`; replicas and waiting seconds are means over that time.

    `demand` is the replica seconds that arrived per second.
    """

    at_s: float
    length_s: float
    demand: float
    replicas: float
    starting: float
    waiting_s: float


class Curve:
    """A curve of points of equal length; when there are too many, each two become one."""

    def __init__(self) -> None:
        # A power of two, so that the borders between points are exact.
        self.length_s = 1.0
        # For each point: arrived seconds, then integrals over time of replicas, starting, waiting.
        self.sums: list[list[float]] = [[0.0, 0.0, 0.0, 0.0]]
        self.until_s = 0.0

    def arrive(self, at_s: float, cost_s: float) -> None:
        """Add the price of a request that arrived."""
        self._bin(at_s)[0] += cost_s

    def pass_time(self, now: float, replicas: int, starting: int, waiting_s: float) -> None:
        """Take in the state that has held since the last call."""
        while self.until_s < now:
            sums = self._bin(self.until_s)
            end = min(now, (int(self.until_s / self.length_s) + 1) * self.length_s)
            step_s = end - self.until_s
            sums[1] += replicas * step_s
            sums[2] += starting * step_s
            sums[3] += waiting_s * step_s
            self.until_s = end

    def points(self) -> tuple[Point, ...]:
        """Return the points in order of time."""
        made = []
        for place, (arrived_s, *means) in enumerate(self.sums):
            at_s = place * self.length_s
            known_s = min(self.length_s, self.until_s - at_s)
            if known_s > 0:
                made.append(
                    Point(at_s, known_s, arrived_s / known_s, *(mean / known_s for mean in means))
                )
        return tuple(made)

    def _bin(self, at_s: float) -> list[float]:
        while at_s >= MAX_POINTS * self.length_s:
            self.length_s *= 2
            pairs = zip(self.sums[::2], [*self.sums[1::2], [0.0] * 4], strict=False)
            self.sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
        place = int(at_s / self.length_s)
        while len(self.sums) <= place:
            self.sums.append([0.0] * 4)
        return self.sums[place]


@dataclass(frozen=True)
class TierOutcome:
    """The counts of a tier's requests, or of all tiers', by their end; `_s` are replica seconds.

    Met: done by the deadline; late: done after it. Lost: its replica died twice, or the retry was
    refused. `gpu_hours` count all GPUs from the order of a replica to its end, cold starts
    included.
    """

    num_arrived: int = 0
    num_met: int = 0
    num_late: int = 0
    num_refused: int = 0
    num_lost: int = 0
    arrived_s: float = 0.0
    met_s: float = 0.0
    gpu_hours: float = 0.0
    waits: Waits = field(default_factory=Waits)
    points: tuple[Point, ...] = ()

    @property
    def attainment(self) -> float:
        """The share of the requests that met their deadline; 1 if there were none."""
        return self.num_met / self.num_arrived if self.num_arrived else 1.0

    @property
    def attainment_by_gpu_seconds(self) -> float:
        """The same share, with each request weighted by its replica seconds."""
        # The two sums add in different orders, so rounding may bring their ratio above 1.
        return min(self.met_s / self.arrived_s, 1.0) if self.arrived_s else 1.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of a simulation by tier, and the time at which it ended."""

    tiers: dict[str, TierOutcome]
    end_s: float

    @property
    def total(self) -> TierOutcome:
        """The counts and GPU hours of all tiers together; waits and points stay with each tier."""
        total = TierOutcome()
        for tier in self.tiers.values():
            total = replace(
                total,
                num_arrived=total.num_arrived + tier.num_arrived,
                num_met=total.num_met + tier.num_met,
                num_late=total.num_late + tier.num_late,
                num_refused=total.num_refused + tier.num_refused,
                num_lost=total.num_lost + tier.num_lost,
                arrived_s=total.arrived_s + tier.arrived_s,
                met_s=total.met_s + tier.met_s,
                gpu_hours=total.gpu_hours + tier.gpu_hours,
            )
        return total


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: its arrival, tier and key, its price, and the seconds it may take in all.

    `cost_s` is the price in replica seconds. `actual_s` is what it will really take, None for the
    same; the simulated replicas know it, the policies never do.
    """

    at_s: float
    tier: str
    cost_s: float
    deadline_s: float
    key: str = ""
    weight: float = 1.0
    actual_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReplicaOutage:
    """The death of a replica at `at_s`; `replica` is its index among those that are up."""

    at_s: float
    tier: str
    replica: int = 0


class QueuePolicy(Protocol):
    """A policy that stands between the arrivals and the replicas of one tier.

    `flux_ray.router.queue.tier_queue.TierQueue` is ours; those that it is compared with are in
    tests/bench/opponents/routers.py. Times are on the caller's clock. A replica that is assigned
    more requests than it has slots works them off in order.
    """

    def add_replica(self, name: str, now: float) -> None:
        """Note that a replica is up and free."""

    def expect_replica(self, name: str, ready_at: float, now: float) -> None:
        """Note that a replica is starting, and will be added at about `ready_at`."""

    def drain_replica(self, name: str, now: float) -> None:
        """Assign the replica nothing more; it finishes what it runs. Forget a starting one."""

    def lose_replica(self, name: str, now: float) -> list[QueuedRequest]:
        """Remove a dead replica, and return the requests that it had not finished."""

    def submit(self, queued: QueuedRequest, now: float) -> Rejection | None:
        """Admit a request and return None, or return why not."""

    def take(self, now: float) -> tuple[list[Assignment], list[RejectedEntry]]:
        """Return the assignments that are due now, and the requests that waited in vain."""

    def progress(self, ticket_id: str, remaining_s: float, now: float) -> None:
        """Note how many seconds an assigned request will still take, as its replica reports."""

    def finish(self, ticket_id: str, now: float) -> None:
        """Remove an assigned request that is done."""

    def wake_at(self) -> float | None:
        """Return when take() is to be called next if nothing else happens; None if never."""

    def waiting_s(self, now: float) -> float:
        """Return the replica seconds of all waiting requests."""

    def running_s(self, now: float) -> float:
        """Return the replica seconds that assigned requests still take."""


@dataclass(frozen=True)
class ReplicaPool:
    """The replicas of one tier, with their policies; made anew for each simulation.

    A new replica is usable after `cold_start_s`; one that dies is replaced after as long.
    `report_period_s`: how often replicas tell the queue how long their work will still take.
    """

    tier: str
    queue: QueuePolicy
    num_replicas: int
    num_gpus_per_replica: int = 1
    cold_start_s: float = 0.0
    scaling: Scaling | None = None
    min_replicas: int = 0
    max_replicas: int = 1_000_000
    slots_per_replica: int = 1
    report_period_s: float | None = None


def check_pools(pools: Iterable[ReplicaPool]) -> dict[str, ReplicaPool]:
    """Return the pools by tier; ValueError if two are of one tier or bounds are impossible."""
    by_tier: dict[str, ReplicaPool] = {}
    for pool in pools:
        if pool.tier in by_tier:
            raise ValueError(f"two pools are of the tier {pool.tier}")
        if not 0 <= pool.min_replicas <= pool.max_replicas:
            raise ValueError(f"{pool.tier}: min_replicas is above max_replicas")
        by_tier[pool.tier] = pool
    return by_tier
