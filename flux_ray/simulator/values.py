"""What a simulation is made of: arrivals, failures, pools, and what a pool's policies must do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from flux_ray.router.autoscaling.state import Scaling
from flux_ray.router.queue.entry import Assignment, QueuedRequest, RejectedEntry, Rejection


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when, for whom, its estimated GPU seconds, and the seconds it may take in all.

    `actual_s` is what it will really take, where that is not the estimate: the engine knows it,
    the policies never do.
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
    """At that time the replica of that index, among those of the tier that are up, dies."""

    at_s: float
    tier: str
    replica: int = 0


class QueuePolicy(Protocol):
    """What stands between the arrivals and the replicas of one tier.

    `flux_ray.router.queue.tier_queue.TierQueue` is ours; the opponents are in
    tests/bench/opponents/routers.py. Times are on the caller's clock. A replica that gets more
    grants than it has slots works them off in order.
    """

    def add_replica(self, name: str, now: float) -> None:
        """It is up, and free."""

    def expect_replica(self, name: str, ready_at: float, now: float) -> None:
        """It is starting, and will be added about then."""

    def drain_replica(self, name: str, now: float) -> None:
        """It gets nothing new; what it runs, it finishes. One that is expected is forgotten."""

    def lose_replica(self, name: str, now: float) -> list[QueuedRequest]:
        """It is gone. Returned is what it had been granted and has not finished."""

    def offer(self, ticket: QueuedRequest, now: float) -> Rejection | None:
        """A ticket arrives; None if it is taken in."""

    def take(self, now: float) -> tuple[list[Assignment], list[RejectedEntry]]:
        """Whose turn it is now, and who has waited in vain."""

    def progress(self, ticket_id: str, remaining_s: float, now: float) -> None:
        """The replica reports how many seconds a granted ticket will still take."""

    def finish(self, ticket_id: str, now: float) -> None:
        """A granted ticket is done."""

    def wake_at(self) -> float | None:
        """When take() should be called though nothing else happens."""

    def waiting_s(self, now: float) -> float:
        """GPU seconds that are not granted yet."""

    def running_s(self, now: float) -> float:
        """GPU seconds that are granted and not done yet."""


@dataclass(frozen=True)
class ReplicaPool:
    """The replicas of one tier. `queue` is used up by a simulation: make a new one for each.

    A replica asked for is usable `cold_start_s` later; one that dies comes back after as long.
    `report_period_s`: replicas tell the queue that often how long their work will still take.
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
    """By tier; ValueError if two are of one tier or the bounds are impossible."""
    by_tier: dict[str, ReplicaPool] = {}
    for pool in pools:
        if pool.tier in by_tier:
            raise ValueError(f"two pools are of the tier {pool.tier}")
        if not 0 <= pool.min_replicas <= pool.max_replicas:
            raise ValueError(f"{pool.tier}: min_replicas is above max_replicas")
        by_tier[pool.tier] = pool
    return by_tier
