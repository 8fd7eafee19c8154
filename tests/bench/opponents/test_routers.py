"""The opponents do what they are named after, bounded or not; and nobody beats the bound."""

import random

import pytest

from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.simulator.fleet import simulate
from flux_ray.simulator.outcome import Arrival, QueuePolicy, ReplicaPool
from tests.bench.opponents.fluid import preemptive_bound
from tests.bench.opponents.preemptive import preemptive_estimate
from tests.bench.opponents.routers import (
    Choice,
    EarlyBinding,
    Fifo,
    least_requests,
    least_work,
    power_of_two,
    round_robin,
)


def placed(queue: QueuePolicy, *costs_s: float, num_replicas: int = 2) -> list[str | None]:
    """Where tickets go that come at once; None for refused or waiting."""
    for number in range(num_replicas):
        queue.add_replica(f"r{number}", 0.0)
    places: list[str | None] = []
    for number, cost_s in enumerate(costs_s):
        queue.submit(QueuedRequest(str(number), "tiny", cost_s, 1e9), 0.0)
        grants, _ = queue.take(0.0)
        places.append(grants[0].replica if grants else None)
    return places


def test_round_robin_takes_turns() -> None:
    assert placed(EarlyBinding(round_robin()), 1, 1, 1, 1) == ["r1", "r0", "r1", "r0"]


def test_least_requests_counts() -> None:
    assert placed(EarlyBinding(least_requests()), 9, 1, 1, 1) == ["r0", "r1", "r0", "r1"]


def test_least_work_adds_seconds() -> None:
    assert placed(EarlyBinding(least_work()), 9, 1, 1, 1) == ["r0", "r1", "r1", "r1"]


def test_power_of_two_takes_the_shorter_queue_of_two() -> None:
    assert sorted(filter(None, placed(EarlyBinding(power_of_two()), 1, 1))) == ["r0", "r1"]
    places = placed(EarlyBinding(power_of_two()), *[1.0] * 200, num_replicas=10)
    assert max(places.count(name) for name in set(places)) < 26


def test_one_queue_binds_late() -> None:
    assert placed(Fifo(), 5, 5, 1, 1) == ["r0", "r1", None, None]


@pytest.mark.parametrize("choice", [round_robin, power_of_two, least_requests, least_work])
def test_early_bounds_refuse(choice: type[Choice]) -> None:
    assert placed(EarlyBinding(choice(), bound_requests=1), 1, 1, 1)[2] is None
    assert placed(EarlyBinding(least_work(), bound_s=0.5), 1, 1, 1)[2] is None


def test_bounds_of_one_queue_refuse() -> None:
    for bounds in ({"bound_requests": 1}, {"bound_s": 5.5}):
        queue = Fifo(**bounds)
        placed(queue, 5, 5, 1)
        assert queue.waiting_s(0.0) == 1.0
        refused = queue.submit(QueuedRequest("x", "tiny", 1.0, 1e9), 0.0)
        assert (refused is None) == ("bound_s" in bounds)
    assert queue.submit(QueuedRequest("z", "tiny", 1.0, 1e9), 0.0) is not None


def test_without_replicas_tickets_wait_for_one() -> None:
    queue = EarlyBinding(least_work())
    queue.submit(QueuedRequest("a", "tiny", 1.0, 1e9), 0.0)
    assert queue.waiting_s(0.0) == 1.0
    queue.add_replica("r0", 5.0)
    assert [grant.replica for grant in queue.take(5.0)[0]] == ["r0"]
    assert queue.lose_replica("r0", 5.0) == [QueuedRequest("a", "tiny", 1.0, 1e9)]
    assert queue.running_s(5.0) == 0.0


def mixed(load: float, scale: float, num_replicas: int, seed: int) -> list[Arrival]:
    dice = random.Random(seed)
    made, now = [], 0.0
    for _ in range(800):
        now += dice.expovariate(load * num_replicas / 7.1)
        (cost_s,) = dice.choices((4.0, 9.0, 25.0), (0.7, 0.2, 0.1))
        made.append(Arrival(now, "dev", cost_s, scale * cost_s))
    return made


@pytest.mark.parametrize("load", [0.6, 0.95, 1.5])
@pytest.mark.parametrize("scale", [1.0, 1.2, 3.0])
def test_nobody_beats_the_bound(load: float, scale: float) -> None:
    arrivals = mixed(load, scale, 4, seed=1)
    bound = preemptive_bound(arrivals, 4)
    estimate = preemptive_estimate(arrivals, 4)
    assert bound.by_requests <= 1 and bound.by_gpu_seconds <= 1
    results = [(estimate.by_requests, estimate.by_gpu_seconds)]
    for queue in (TierQueue(), Fifo(), EarlyBinding(least_work(), bound_s=1.0)):
        tier = simulate(arrivals, [ReplicaPool("dev", queue, 4)]).tiers["dev"]
        results.append((tier.attainment, tier.attainment_by_gpu_seconds))
    for by_requests, by_gpu_seconds in results:
        assert by_requests <= bound.by_requests + 1e-9
        assert by_gpu_seconds <= bound.by_gpu_seconds + 1e-9


def test_the_bound_is_tight_where_it_can_be() -> None:
    # Two requests for one replica, of which one fits: half of the shorter, or either.
    arrivals = [Arrival(0.0, "dev", 4.0, 4.0), Arrival(0.0, "dev", 2.0, 2.0)]
    bound = preemptive_bound(arrivals, 1)
    assert bound.by_gpu_seconds == pytest.approx(4 / 6)
    assert 0.5 <= bound.by_requests <= 0.77
    assert preemptive_estimate(arrivals, 1).by_requests == 0.5
    assert preemptive_bound([Arrival(0.0, "dev", 4.0, 3.0)], 9).by_requests == 0.0


def test_preemption_saves_the_urgent() -> None:
    arrivals = [Arrival(0.0, "dev", 10.0, 20.0), Arrival(1.0, "dev", 1.0, 1.0)]
    assert preemptive_estimate(arrivals, 1).by_requests == 1.0
