"""Replicas for work that arrives: up early, down late, still under noise, to zero and back."""

import logging
import random
from dataclasses import replace

import pytest

from flux_ray.router.autoscaling.scaler import LastGoodTarget, Scaler, ScalingRules, ScalingState

RULES = ScalingRules(target_wait_s=10.0, cold_start_s=60.0, headroom=0.0, idle_s=120.0)


class Tier:
    """Replicas that are up as soon as they are asked for, and work that is done at once."""

    def __init__(self, rules=RULES, current=4, least=0, most=100):
        self.scaler = Scaler(rules)
        self.current = current
        self.bounds = (least, most)
        self.now = 0.0
        self.history = []

    def pass_time(self, seconds, arrived_s=0.0, waiting_s=0.0):
        """`arrived_s` arrives every second; the target at the end."""
        for _ in range(seconds):
            amount = arrived_s() if callable(arrived_s) else arrived_s
            state = ScalingState(self.now, self.current, 0, waiting_s, 0.0, amount, *self.bounds)
            self.current = self.scaler.replicas(state)
            self.history.append(self.current)
            self.now += 1.0
        return self.current

    @property
    def num_changes(self):
        return sum(a != b for a, b in zip(self.history, self.history[1:], strict=False))


def test_replicas_are_the_work_of_a_second():
    assert Tier(current=1).pass_time(60, arrived_s=3.6) == 4
    assert Tier(current=9).pass_time(100, arrived_s=3.6) == 4


def test_headroom_is_for_waves_and_not_for_a_steady_stream():
    rules = replace(RULES, headroom=1.0)
    assert Tier(rules).pass_time(300, arrived_s=3.6) == 4
    lumps = iter([36.0, *[0.0] * 9] * 60)
    assert Tier(rules).pass_time(600, arrived_s=lambda: next(lumps)) >= 7


def requests(rng, rate):
    """About so much work a second, in requests of half a second or one and a half."""
    return lambda: sum(rng.choice((0.5, 1.5)) for _ in range(rng.randint(0, 2 * rate)))


def test_a_burst_is_seen_in_seconds():
    tier = Tier(replace(RULES, headroom=0.5))
    rng = random.Random(1)
    before = tier.pass_time(600, requests(rng, 4))
    assert 4 <= before <= 6
    assert tier.pass_time(10, requests(rng, 40)) >= 25
    assert 36 <= tier.pass_time(110, requests(rng, 40)) <= 52


def test_what_a_burst_needed_is_kept_for_the_hold_and_then_let_go():
    rng = random.Random(1)
    tier = Tier(replace(RULES, headroom=0.5, hold_s=60.0))
    before = tier.pass_time(600, requests(rng, 4))
    peak = tier.pass_time(120, requests(rng, 40))
    assert tier.pass_time(55, requests(rng, 4)) == peak
    tier.pass_time(45, requests(rng, 4))
    # No memory of the burst: the traffic is what it was.
    assert tier.pass_time(60, requests(rng, 4)) <= before + 2


def test_a_replica_stays_for_a_third_of_a_start_and_ten_seconds_at_least():
    assert replace(RULES, cold_start_s=90.0).stay_s == 30.0
    assert replace(RULES, cold_start_s=3.0).stay_s == 10.0
    assert replace(RULES, hold_s=0.0).stay_s == 0.0


def test_noise_does_not_flap():
    tier = Tier(replace(RULES, headroom=1.0), current=8)
    rng = random.Random(2)
    # One request in two seconds, most of them small and some worth six times as much.
    tier.pass_time(3600, lambda: rng.choices((0, 4, 9, 25), (50, 35, 10, 5))[0])
    assert tier.num_changes <= 40
    assert min(tier.history[600:]) >= 4 and max(tier.history[600:]) <= 12


def test_a_need_on_the_edge_of_a_replica_changes_nothing():
    tier = Tier(current=4)
    wobble = iter([3.9, 4.1] * 300)
    tier.pass_time(600, lambda: next(wobble))
    assert set(tier.history) == {4}


def test_the_target_never_falls_before_the_hold():
    tier = Tier(replace(RULES, hold_s=200.0), current=20)
    assert tier.pass_time(199, arrived_s=2.0) == 20
    assert tier.pass_time(20, arrived_s=2.0) == 2


@pytest.mark.parametrize(
    ("current", "waiting_s", "need"),
    [
        (5, 0.0, 4.0),
        # One of five is to spare: 70 of the waiting seconds are done when help could have done it.
        (5, 70.0, 4.0),
        (5, 140.0, 5.0),
        (5, 490.0, 10.0),
        # Nobody works on it until others are up, and then it is to be gone in 10 s.
        (0, 140.0, 18.0),
    ],
)
def test_a_backlog_counts_as_far_as_it_outlasts_what_is_there(current, waiting_s, need):
    scaler = Scaler(RULES)
    state = ScalingState(0.0, current, 0, 0.0, 0.0, 4.0, 0, 100)
    for second in range(100):
        scaler.replicas(replace(state, now=float(second)))
    assert scaler.need(state, waiting_s) == pytest.approx(need)


def test_starting_replicas_are_not_asked_for_again():
    scaler = Scaler(RULES)
    state = ScalingState(0.0, 0, 0, 100.0, 0.0, 0.0, 0, 100)
    assert scaler.replicas(state) == 10
    assert scaler.replicas(replace(state, now=1.0, starting=10)) == 10


def test_to_zero_and_back():
    tier = Tier(current=1)
    tier.pass_time(60, arrived_s=0.2)
    assert tier.pass_time(119) == 1
    assert tier.pass_time(2) == 0
    assert tier.pass_time(600) == 0
    assert tier.pass_time(1, waiting_s=0.01) == 1


def test_refused_work_wakes_a_tier_at_zero():
    """What finds no replica is refused where its deadline is shorter than a start."""
    tier = Tier(current=0)
    assert tier.pass_time(300) == 0
    assert tier.pass_time(1, arrived_s=0.5) == 1


def test_not_idle_while_something_runs():
    scaler = Scaler(RULES)
    state = ScalingState(0.0, 1, 0, 0.0, 5.0, 0.0, 0, 9)
    assert [scaler.replicas(replace(state, now=float(now))) for now in range(0, 900, 100)] == [
        1
    ] * 9


def test_bounds():
    assert Tier(current=2, least=2).pass_time(1000) == 2
    assert Tier(current=2, most=3).pass_time(100, arrived_s=50.0) == 3


def test_an_unknown_backlog_keeps_the_target():
    tier = Tier(current=7)
    tier.pass_time(100, arrived_s=7.0)
    assert tier.pass_time(1000, waiting_s=None) == 7
    # What was needed meanwhile is not known either.
    assert tier.pass_time(19) == 7
    assert tier.pass_time(2) < 7
    state = ScalingState(5000.0, 2, 3, None, 0.0, 1.0, 0, 9)
    assert Scaler(RULES).replicas(state) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_wait_s", 0.0), ("cold_start_s", -1.0), ("headroom", -0.1), ("idle_s", -5.0)],
)
def test_rules_that_are_none(field, value):
    with pytest.raises(ValueError, match=field):
        replace(RULES, **{field: value})


class Scripted:
    def __init__(self, *answers):
        self.answers = list(answers)

    def replicas(self, state):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


STATE = ScalingState(0.0, 3, 2, 1.0, 1.0, 1.0, 1, 8)


def test_a_policy_that_fails_keeps_the_target(caplog):
    policy = LastGoodTarget(Scripted(4, ZeroDivisionError(), RuntimeError(), 6, KeyError(), 99, 0))
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        answers = [policy.replicas(STATE) for _ in range(7)]
    assert answers == [4, 5, 5, 6, 5, 8, 1]
    # Once for each time that it began to fail.
    assert caplog.text.count("a scaling policy failed: the target stays at 5") == 2


@pytest.mark.parametrize("answer", [None, float("nan"), "many"])
def test_nonsense_keeps_the_target(answer):
    assert LastGoodTarget(Scripted(answer)).replicas(STATE) == 5
