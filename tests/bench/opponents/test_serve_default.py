"""Serve's default autoscaling in the simulator decides as the installed Serve does."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig

from flux_ray.router.autoscaling.scaler import ScalingState
from tests.bench.opponents.serve_default import TUNED, ServeDefault, ServeSettings

QUICK = ServeSettings(
    target_ongoing_requests=1.0, look_back_period_s=5.0, upscale_delay_s=3.0, downscale_delay_s=10.0
)


def test_the_defaults_are_serves():
    theirs = AutoscalingConfig()
    ours = ServeSettings()
    for name in ("target_ongoing_requests", "look_back_period_s", "upscale_delay_s"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.downscale_delay_s == theirs.downscale_delay_s
    assert ours.aggregation_function == theirs.aggregation_function
    assert theirs.get_upscaling_factor() == ours.upscaling_factor


@pytest.mark.parametrize(
    "settings",
    [
        QUICK,
        replace(TUNED, downscale_delay_s=10.0),
        replace(QUICK, target_ongoing_requests=2.5, upscaling_factor=2.0, downscaling_factor=0.3),
        replace(QUICK, upscale_delay_s=0.0, downscale_to_zero_delay_s=4.0),
    ],
)
def test_every_decision_is_serves_own(settings, monkeypatch):
    """Serve's function, on a clock and with counts of ours, over a random walk."""
    rng = random.Random(1)
    policy = ServeDefault(settings, lambda: 0)
    decide = autoscaling_policy._apply_autoscaling_config(
        autoscaling_policy._core_replica_queue_length_policy
    )
    config = AutoscalingConfig(
        min_replicas=0,
        max_replicas=50,
        target_ongoing_requests=settings.target_ongoing_requests,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        downscale_to_zero_delay_s=settings.downscale_to_zero_delay_s,
        upscaling_factor=settings.upscaling_factor,
        downscaling_factor=settings.downscaling_factor,
    )
    state, current, target, water_level = {}, 1, 1, 0.0
    seen = set()
    for second in range(3000):
        monkeypatch.setattr(autoscaling_policy.time, "time", lambda now=second: float(now))
        if second % 40 == 0:
            water_level = rng.choice((0.0, 0.5, 4.0, 12.0, 30.0))
        total = max(0.0, water_level + rng.choice((-0.5, 0.0, 0.5, 1.0))) if water_level else 0.0
        context = SimpleNamespace(
            current_num_replicas=current,
            target_num_replicas=target,
            total_num_requests=total,
            config=config,
            policy_state=state,
        )
        theirs, state = decide(context)
        assert policy.decision(total, current, target, float(second)) == theirs, second
        target = min(max(theirs, 0), 50)
        if rng.random() < 0.8:
            current += (target > current) - (target < current)
        seen.add(target)
    assert {0, 1} < seen
    assert len(seen) > 5


class Fleet:
    """As many replicas as are asked for, at once."""

    def __init__(self, settings, current=1):
        self.num_ongoing = 0
        self.policy = ServeDefault(settings, lambda: self.num_ongoing)
        self.current, self.now = current, 0.0

    def pass_time(self, seconds, num_ongoing):
        self.num_ongoing = num_ongoing
        for _ in range(seconds):
            state = ScalingState(self.now, self.current, 0, 0.0, 0.0, 0.0, 0, 20)
            self.current = self.policy.replicas(state)
            self.now += 1
        return self.current


def test_requests_over_their_target_after_the_delay():
    fleet = Fleet(QUICK)
    fleet.pass_time(20, 1)
    assert fleet.pass_time(4, 8) < 8
    assert fleet.pass_time(20, 8) == 8
    assert fleet.pass_time(10, 2) == 8
    assert fleet.pass_time(20, 2) == 2


def test_the_mean_of_the_look_back_and_the_most_of_it():
    state = ScalingState(0.0, 4, 0, 0.0, 0.0, 0.0, 0, 20)
    for how, total in (("mean", 4.0), ("max", 20.0)):
        counts = iter([0, 0, 0, 0, 20, 20])
        policy = ServeDefault(replace(QUICK, aggregation_function=how), lambda c=counts: next(c))
        for second in range(5):
            policy.replicas(replace(state, now=float(second)))
        assert policy._total(5.0) == total


def test_the_first_request_of_none_starts_one_at_once():
    fleet = Fleet(QUICK, current=0)
    assert fleet.pass_time(50, 0) == 0
    assert fleet.pass_time(2, 3) == 1


def test_bounds():
    assert Fleet(replace(QUICK, upscale_delay_s=0.0)).pass_time(30, 500) == 20
