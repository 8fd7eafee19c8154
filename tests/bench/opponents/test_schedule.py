"""The oracle: replicas ordered in time for what is known to come, and none that are not needed."""

from dataclasses import replace

import pytest

from flux_ray.router.autoscaling.scaler import ScalingState
from flux_ray.simulator.fleet import simulate
from flux_ray.simulator.outcome import Arrival, ReplicaPool
from tests.bench.opponents.routers import Fifo
from tests.bench.opponents.schedule import Schedule, Trial, cheapest, demand_of

STATE = ScalingState(0.0, 1, 0, 0.0, 0.0, 0.0, 0, 100)


def test_ordered_a_cold_start_before_and_kept_over_a_short_gap():
    schedule = Schedule((1, 1, 5, 1, 1, 1, 4, 1, 3), cold_start_s=20.0, slot_s=10.0)
    wanted = [schedule.replicas(replace(STATE, now=at_s)) for at_s in range(0, 100, 10)]
    assert wanted == [5, 5, 5, 1, 4, 4, 4, 3, 3, 3]


def test_bounds():
    schedule = Schedule((0, 9), cold_start_s=0.0, slot_s=10.0)
    assert schedule.replicas(replace(STATE, min_replicas=2)) == 2
    assert schedule.replicas(replace(STATE, now=10.0, max_replicas=4)) == 4


def test_demand():
    arrivals = [Arrival(at_s, "a", 6.0, 9.0) for at_s in (0.0, 5.0, 25.0, 99.0)]
    assert demand_of(arrivals, 30.0, slot_s=10.0) == pytest.approx([1.2, 0.0, 1.2])


def test_the_cheapest_attains_what_it_must_and_no_slot_can_be_lower():
    arrivals = [Arrival(600 + 2 * n, "a", 10.0, 30.0) for n in range(60)]

    def attempt(schedule):
        pool = ReplicaPool("a", Fifo(), 1, cold_start_s=40.0, scaling=schedule)
        tier = simulate(arrivals, [pool], horizon_s=1200.0).tiers["a"]
        return Trial(tier.attainment, tier.gpu_hours)

    demand = demand_of(arrivals, 1200.0)
    schedule, trial = cheapest(demand, 40.0, 0.9, attempt)
    assert trial == attempt(schedule)
    assert trial.attainment >= 0.9
    # 540 seconds of work at the least, and less than four replicas all the time.
    assert 540 / 3600 < trial.gpu_hours < 0.5
    # Nothing before a cold start, nothing after the last deadline.
    assert set(schedule.needs[:18]) == set(schedule.needs[26:]) == {0}


def test_what_cannot_be_attained():
    with pytest.raises(ValueError, match=r"no schedule attains 0\.990"):
        cheapest([1.0], 1.0, 0.99, lambda schedule: Trial(0.5, 1.0))
