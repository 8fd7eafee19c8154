"""Tiers within one GPU budget: who waits for whom, who is forgotten, and who says what."""

import logging
from dataclasses import replace

import pytest

from flux_ray.router.autoscaling.gpu_budget import Budgeted, BudgetTerms, GpuBudget
from flux_ray.router.autoscaling.scaler import LastGoodTarget, ScalingState

STATE = ScalingState(0.0, 4, 0, 0.0, 0.0, 0.0, 1, 100)


class Tier:
    """One that does at once what it is told, like Serve with the policy of a tier."""

    def __init__(self, budget, name, wanted, terms, current=1, least=1):
        self.wanted = wanted
        self.policy = LastGoodTarget(Budgeted(self, budget, name, terms))
        self.current = current
        self.least = least

    def replicas(self, state):
        if isinstance(self.wanted, Exception):
            raise self.wanted
        return self.wanted

    def ask(self, now=0.0):
        state = replace(STATE, now=now, current=self.current, min_replicas=self.least)
        self.current = self.policy.replicas(state)
        return self.current


def dev_and_klein(num_gpus=12, **klein):
    """Groups of two, which come first, and single cards."""
    budget = GpuBudget()
    dev = Tier(budget, "dev", 6, BudgetTerms(num_gpus, num_gpus_per_replica=2, priority=1))
    return dev, Tier(budget, "klein", 8, BudgetTerms(num_gpus), **klein)


def test_gpus_are_not_given_away_before_they_are_let_go():
    dev, klein = dev_and_klein(current=8)
    # klein has 8 of the 12 GPUs, and dev, which comes first, wants them all.
    assert [klein.ask(), dev.ask(), klein.ask(), dev.ask(), klein.ask(), dev.ask()] == [
        8,
        2,
        2,
        2,
        2,
        5,
    ]


def test_a_budget_that_suffices_changes_nothing():
    dev, klein = dev_and_klein(100)
    assert (dev.ask(), klein.ask()) == (6, 8)


def test_what_the_first_no_longer_wants_is_the_others():
    dev, klein = dev_and_klein()
    assert (dev.ask(), klein.ask()) == (6, 1)
    dev.wanted = 2
    for _ in range(3):
        dev.ask(), klein.ask()
    assert (dev.current, klein.current) == (2, 8)


def test_a_tier_that_is_gone_holds_nothing_for_ever():
    dev, klein = dev_and_klein(current=0, least=0)
    dev.ask()
    assert [klein.ask(now) for now in range(61)] == [0] * 61
    assert klein.ask(61.0) == 8


def test_a_tier_that_comes_again_is_the_same_one():
    """As after a redeployment: a new policy object, and the replicas that there were."""
    budget = GpuBudget()
    terms = BudgetTerms(6)
    assert Tier(budget, "dev", 4, terms).ask() == 4
    assert Tier(budget, "dev", 6, terms, current=4).ask(1.0) == 6


def test_a_pause_of_everybody_makes_nobody_gone():
    dev, klein = dev_and_klein(current=0, least=0)
    assert (dev.ask(), klein.ask()) == (6, 0)
    # Serve's controller was blocked for a minute; klein happens to be asked first.
    assert (klein.ask(60.0), dev.ask(60.0)) == (0, 6)


def test_where_tiers_disagree_the_smallest_budget_counts_and_is_logged(caplog):
    budget = GpuBudget()
    one = Tier(budget, "one", 9, BudgetTerms(12))
    other = Tier(budget, "other", 9, BudgetTerms(4))
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        assert [one.ask(), other.ask()] == [9, 1]
        for now in range(5):
            one.ask(now), other.ask(now)
    assert (one.current, other.current) == (2, 2)
    assert caplog.text.count("gpu_budget differs between tiers") == 1
    assert "the smallest counts: one 12, other 4" in caplog.text


@pytest.mark.parametrize("wanted", [RuntimeError("broken"), None, "many"])
def test_a_failing_policy_keeps_its_target_and_what_it_holds(wanted):
    budget = GpuBudget()
    failing = LastGoodTarget(Tier(budget, "failing", wanted, BudgetTerms(6)))
    policy = Budgeted(failing, budget, "failing", BudgetTerms(6, priority=1))
    other = Tier(budget, "other", 6, BudgetTerms(6))
    for now in range(100):
        assert policy.replicas(replace(STATE, now=float(now))) == 4
        assert other.ask(float(now)) <= 2


def test_the_minimum_is_above_the_budget():
    """The command line refuses it; where it was deployed all the same, Serve gives the minimum."""
    dev, klein = dev_and_klein(2, current=3, least=3)
    assert (dev.ask(), klein.ask(), dev.ask(), klein.ask()) == (1, 3, 1, 3)


def test_replicas_on_processors_are_not_counted():
    budget = GpuBudget()
    tiny = Tier(budget, "tiny", 9, BudgetTerms(2, num_gpus_per_replica=0))
    klein = Tier(budget, "klein", 9, BudgetTerms(2))
    assert (tiny.ask(), klein.ask()) == (9, 2)
