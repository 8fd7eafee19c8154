"""What must hold of a tier's queue whoever comes, leaves, overruns or dies."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.simulator.fleet import simulate
from flux_ray.simulator.outcome import Arrival, ReplicaPool
from tests.router.queue.driver import Cluster

TIMEOUT_S = 60.0
SAME_S = 1e-3
small = st.integers(0, 7)
costs = st.sampled_from([0.3, 1.0, 2.5, 9.0])
# Seconds beside the work; None is no deadline.
slacks = st.sampled_from([None, None, 0.5, 3.0, 20.0, 100.0])
offers = st.tuples(st.just("submit"), costs, slacks, st.sampled_from("ab"), st.booleans())
STEPS = st.lists(
    st.one_of(
        offers,
        offers,
        offers,
        st.tuples(st.just("pass_time"), st.sampled_from([0.1, 1.0, 7.0, 50.0])),
        st.tuples(st.sampled_from(["leave", "overrun", "die", "start", "away"]), small),
    ),
    min_size=10,
    max_size=50,
)
quiet = [HealthCheck.too_slow]


class Script:
    """A cluster in which one step after the other happens, and nobody is served out of turn."""

    def __init__(self, steps: list[tuple[Any, ...]], lead_s: float = 0.0) -> None:
        self.cluster = Watched(TierQueue(lead_s=lead_s, cold_start_s=10.0), ("r0",))
        self.num_offers = 0
        self.num_replicas = 1
        for name, *args in steps:
            getattr(self, name)(*args)

    def submit(self, cost_s: float, slack_s: float | None, key: str, is_job: bool) -> None:
        cluster, has_deadline = self.cluster, slack_s is not None
        wait_s = TIMEOUT_S if slack_s is None else cost_s + slack_s
        self.num_offers += 1
        cluster.submit(
            QueuedRequest(
                f"t{self.num_offers:03}",
                "tiny",
                cost_s,
                cluster.now + wait_s,
                key,
                has_deadline=has_deadline,
                is_job=is_job,
            )
        )

    def pass_time(self, seconds: float) -> None:
        self.cluster.run_until(self.cluster.now + seconds)

    def leave(self, number: int) -> None:
        names = sorted(self.cluster.waiting) + sorted(self.cluster.running)
        if names:
            name = names[number % len(names)]
            self.cluster.queue.cancel(name, self.cluster.now)
            self.cluster.waiting.pop(name, None)
            self.cluster.running.pop(name, None)
            self.cluster.take()

    def overrun(self, number: int) -> None:
        """It takes ten seconds more than it was priced at, and says so."""
        if self.cluster.running:
            name = sorted(self.cluster.running)[number % len(self.cluster.running)]
            ticket, replica, end = self.cluster.running[name]
            self.cluster.running[name] = ticket, replica, end + 10.0
            self.cluster.queue.progress(name, end + 10.0 - self.cluster.now, self.cluster.now)

    def die(self, number: int) -> None:
        replicas = sorted(self.cluster.replicas)
        if replicas:
            self.cluster.lose(replicas[number % len(replicas)])
            self.cluster.take()

    def away(self, number: int) -> None:
        """Nobody sees a replica for a moment; it works on."""
        replicas = sorted(self.cluster.replicas)
        if replicas:
            name = replicas[number % len(replicas)]
            self.cluster.queue.drain_replica(name, self.cluster.now)
            self.cluster.take()
            self.cluster.add(name)
            self.cluster.take()

    def start(self, number: int) -> None:
        if len(self.cluster.replicas) < 4:
            self.cluster.add(f"r{self.num_replicas}")
            self.num_replicas += 1
            self.cluster.take()


class Watched(Cluster):
    """Looks at every grant and refusal as it is made."""

    def __init__(self, queue: TierQueue, replicas: tuple[str, ...]) -> None:
        self.latest_starts: dict[str, float] = {}
        super().__init__(queue, replicas)

    def take(self) -> None:
        waiting = dict(self.waiting)
        for name, (_, place) in self.queue._places.items():
            self.latest_starts[name] = place.latest_start
        granted, refused = len(self.granted), len(self.refused)
        super().take()
        for name in self.granted[granted:]:
            self.look_at_grant(waiting.pop(name), waiting)
        for name in self.refused[refused:]:
            if name in waiting:
                assert self.now <= self.latest_starts[name] + SAME_S, "refused too late"

    def look_at_grant(self, ticket: QueuedRequest, waiting: dict[str, QueuedRequest]) -> None:
        mates = [other for other in waiting.values() if other.key == ticket.key]
        people = [other for other in mates if not other.is_job and other.ticket_id in self.waiting]
        assert not (ticket.is_job and people), "a job before people"
        if not ticket.has_deadline:
            earlier = [
                other
                for other in mates
                if not other.has_deadline
                and other.is_job == ticket.is_job
                and other.ticket_id < ticket.ticket_id
                and other.ticket_id in self.waiting
            ]
            assert not earlier, "who came later went first"


def nobody_is_served_out_of_turn(steps: list[tuple[Any, ...]], lead_s: float) -> None:
    script = Script(steps, lead_s)
    cluster = script.cluster
    if not cluster.replicas:
        cluster.add("last")
        cluster.take()
    cluster.run_until(cluster.now + 1e6)
    assert not cluster.waiting and not cluster.running
    assert (cluster.queue.waiting_s(cluster.now), cluster.queue.running_s(cluster.now)) == (0, 0)


def who_comes_back_is_taken(
    steps: list[tuple[Any, ...]], cost_s: float, slack_s: float, is_job: bool
) -> None:
    """Under the load of then: nobody else comes, and all takes what it was priced at."""
    cluster = Script(steps).cluster
    if not cluster.replicas:
        cluster.add("last")
        cluster.take()
    key = {"key": "a", "is_job": is_job}
    came = QueuedRequest("came", "tiny", cost_s, cluster.now + cost_s + slack_s, **key)  # type: ignore[arg-type]
    refusal = cluster.submit(came)
    if refusal is not None:
        cluster.run_until(cluster.now + refusal.retry_after_s)
        back = QueuedRequest("back", "tiny", cost_s, cluster.now + cost_s + slack_s, **key)  # type: ignore[arg-type]
        assert cluster.submit(back) is None


@settings(max_examples=100, deadline=None, suppress_health_check=quiet)
@given(STEPS, st.sampled_from([0.0, 0.2]))
def test_nobody_is_served_out_of_turn(steps, lead_s):
    nobody_is_served_out_of_turn(steps, lead_s)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=quiet)
@given(STEPS, st.sampled_from([0.0, 0.2]))
def test_nobody_is_served_out_of_turn_at_length(steps, lead_s):
    nobody_is_served_out_of_turn(steps, lead_s)


@settings(max_examples=100, deadline=None, suppress_health_check=quiet)
@given(STEPS, costs, st.sampled_from([0.0, 0.5, 3.0]), st.booleans())
def test_who_comes_back_when_told_is_taken(steps, cost_s, slack_s, is_job):
    who_comes_back_is_taken(steps, cost_s, slack_s, is_job)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=quiet)
@given(STEPS, costs, st.sampled_from([0.0, 0.5, 3.0]), st.booleans())
def test_who_comes_back_when_told_is_taken_at_length(steps, cost_s, slack_s, is_job):
    who_comes_back_is_taken(steps, cost_s, slack_s, is_job)


@settings(max_examples=100, deadline=None, suppress_health_check=quiet)
@given(st.lists(st.tuples(st.sampled_from([0.1, 1.0, 7.0]), costs, slacks), max_size=30))
def test_the_simulator_serves_whom_the_queue_serves(arrivals):
    """The same arrivals, through the simulated tier and through the cluster that obeys."""
    cluster = Watched(TierQueue(), ("r0", "r1"))
    trace = []
    for number, (gap_s, cost_s, slack_s) in enumerate(arrivals):
        wait_s = TIMEOUT_S if slack_s is None else cost_s + slack_s
        cluster.run_until(cluster.now + gap_s)
        cluster.submit(QueuedRequest(f"t{number:03}", "tiny", cost_s, cluster.now + wait_s))
        trace.append(Arrival(cluster.now, "tiny", cost_s, wait_s))
    cluster.run_until(1e6)
    outcome = simulate(iter(trace), [ReplicaPool("tiny", TierQueue(), 2)])
    tier = outcome.tiers["tiny"]
    assert (tier.num_met, tier.num_refused) == (len(cluster.granted), len(cluster.refused))
