"""The policies of several tiers as Serve's controller makes and asks them. No Ray runs."""

import asyncio
import base64
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from ray import cloudpickle

from flux_ray.app import replicas_of
from flux_ray.config.tier import TierArgs
from flux_ray.router.autoscaling import gpu_budget as budgeted
from flux_ray.router.autoscaling import policy as autoscaling
from flux_ray.router.autoscaling.gpu_budget import GpuBudget
from flux_ray.router.ledger.messages import Backlog

HUB = "owner/name@revision"


@pytest.fixture(autouse=True)
def a_budget_of_its_own(monkeypatch):
    monkeypatch.setattr(budgeted, "_CLUSTER", GpuBudget())


@dataclass
class Books:
    """A ledger that says that so much waits, and has arrived."""

    waiting_s: float
    arrived_s: float = 0.0
    is_asked_for: bool = False

    async def backlog(self, tier, cold_start_s):
        return Backlog(self.waiting_s, 0.0, self.arrived_s, self.is_asked_for)


class Deployment:
    """A tier as Serve's controller keeps it: its policy, its bounds, and its target."""

    def __init__(self, tier, waiting_s, tensor=1, target=1, **scaling):
        scaling = {"min_replicas": 0, "max_replicas": 99} | scaling
        self.args = TierArgs(
            tier=tier, weights=HUB, parallel={"tensor": tensor}, autoscaling=scaling
        )
        self.target = target
        self.deploy(Books(waiting_s))

    def deploy(self, books):
        """As ray/serve/_private/autoscaling_state.py does, after pickling the class by value."""
        self.config = replicas_of(self.args)["autoscaling_config"]
        policy = self.config.policy
        self.policy = policy.get_policy()(**policy.policy_kwargs)
        self.policy._ledger = books

    def ask(self):
        self.target, _ = self.policy(
            SimpleNamespace(
                current_num_replicas=self.target,
                target_num_replicas=self.target,
                capacity_adjusted_min_replicas=self.config.min_replicas,
                capacity_adjusted_max_replicas=self.config.max_replicas,
            )
        )


def targets_of(*tiers, rounds=5):
    """After so many turns of the controller's loop."""

    async def turn():
        for _ in range(rounds):
            for tier in tiers:
                tier.ask()
            await asyncio.sleep(0)

    asyncio.run(turn())
    return [tier.target for tier in tiers]


PICKLED = """
import base64
from flux_ray.app import replicas_of
from flux_ray.config.tier import TierArgs
args = TierArgs(tier="tiny", autoscaling={"max_replicas": 2})
policy = replicas_of(args)["autoscaling_config"].policy
print(base64.b64encode(policy.get_serialized_policy_def()).decode())
"""


def test_policies_that_other_processes_pickled_share_one_budget():
    """Serve pickles the module of a policy by value, once for each application."""
    run = subprocess.run(
        [sys.executable, "-c", PICKLED], capture_output=True, text=True, check=True
    )
    copied = cloudpickle.loads(base64.b64decode(run.stdout.split()[-1]))
    assert copied is not autoscaling.LedgerPolicy, "what is in its module is its own"
    assert copied.__init__.__globals__["cluster_budget"]() is budgeted._CLUSTER


def test_tiers_share_the_gpus_by_priority():
    dev = Deployment("flux-2-dev", 1e6, tensor=2, gpu_budget=9, priority=1)
    klein = Deployment("flux-2-klein-4b", 1e6, gpu_budget=9, target=3)
    assert targets_of(klein, dev) == [1, 4]


def test_without_a_budget_each_has_what_it_wants():
    dev = Deployment("flux-2-dev", 1e6, tensor=2)
    klein = Deployment("flux-2-klein-4b", 1e6)
    assert targets_of(klein, dev) == [99, 99]


def test_a_redeployed_tier_takes_its_own_place():
    dev = Deployment("flux-2-dev", 1e6, tensor=2, gpu_budget=8, min_replicas=1)
    klein = Deployment("flux-2-klein-4b", 1e6, gpu_budget=8, min_replicas=1)
    before = targets_of(dev, klein)
    assert 2 * before[0] + before[1] == 8
    old = dev.policy
    dev.deploy(Books(1e6))
    assert dev.policy is not old
    assert targets_of(dev, klein) == before


def test_after_a_restart_of_the_controller_nobody_takes_what_others_hold():
    """The first that is asked knows of nobody; it has not heard from the ledger yet either."""
    dev = Deployment("flux-2-dev", 1e6, tensor=2, gpu_budget=8, priority=1)
    klein = Deployment("flux-2-klein-4b", 1e6, gpu_budget=8, target=6)
    assert targets_of(dev, klein, rounds=1) == [1, 6]
    assert targets_of(dev, klein) == [4, 0]


def test_a_new_policy_wakes_no_tier_for_what_came_before_it():
    """Only work that arrives from then on, also if a new ledger has counted less so far."""
    klein = Deployment("flux-2-klein-4b", 0.0, target=0)
    books = Books(0.0, arrived_s=1e6)
    klein.deploy(books)
    assert targets_of(klein) == [0]
    for arrived_s in (1e6 + 1.0, 1.0):
        klein.target, books.arrived_s = 0, arrived_s
        klein.policy._asked_at = float("-inf")
        assert targets_of(klein) == [1]


def test_a_request_that_found_no_replica_wakes_a_tier_though_its_work_is_not_new():
    klein = Deployment("flux-2-klein-4b", 0.0, target=0)
    klein.deploy(Books(0.0, arrived_s=7.0, is_asked_for=True))
    assert targets_of(klein) == [1]


def test_a_budget_that_fails_keeps_the_target(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(GpuBudget, "grant", fail)
    assert targets_of(Deployment("flux-2-dev", 1e6, target=3, gpu_budget=8)) == [3]
