"""Two tiers that share a GPU budget in the controller of a real Serve."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flux_ray.router.ledger.messages import GatewayReport, SubmitRequest
from tests.cluster.conftest import DEPLOYED, PATIENCE_S, deploy, wait_until

DEV, KLEIN = "flux-2-dev", "flux-2-klein-4b"
BUDGET = 6


def application(tier: str, tensor: int, priority: int) -> dict[str, Any]:
    scaling = {
        "min_replicas": 1,
        "max_replicas": 9,
        "target_wait_s": 1,
        "cold_start_s": 1,
        "gpu_budget": BUDGET,
        "priority": priority,
    }
    args = {"tier": tier, "weights": "owner/name@revision", "parallel": {"tensor": tensor}}
    return {
        "name": tier,
        "route_prefix": None,
        "import_path": "tests.cluster.unranked:build_tier",
        "args": args | {"autoscaling": scaling},
    }


class Shares:
    """The numbers of replicas that the two tiers have; work for them is reported to the ledger."""

    def __init__(self) -> None:
        from flux_ray.router.ledger.remote import start_ledger

        self._ledger = start_ledger()
        self._offers: tuple[SubmitRequest, ...] = ()
        self.most_gpus = 0

    def bring_work(self, tier: str) -> None:
        self._offers += (SubmitRequest(f"budget-{tier}", tier, cost_s=1000.0, deadline_in_s=1e6),)

    def are(self, **wanted: int) -> bool:
        """Return whether `dev` and `klein` have so many replicas; keep their work waiting."""
        import ray
        from ray import serve

        known = frozenset(offer.ticket_id for offer in self._offers)
        ray.get(
            self._ledger.say.remote("budget", GatewayReport(self._offers, known=known)),
            timeout=PATIENCE_S,
        )
        applications = serve.status().applications
        found = {}
        for name, tier in (("dev", DEV), ("klein", KLEIN)):
            if tier in applications and tier in applications[tier].deployments:
                states = applications[tier].deployments[tier].replica_states
                found[name] = states.get("RUNNING", 0) + states.get("STARTING", 0)
        self.most_gpus = max(self.most_gpus, 2 * found.get("dev", 0) + found.get("klein", 0))
        return found == wanted

    def wait(self, **wanted: int) -> None:
        wait_until(lambda: self.are(**wanted), what=f"{wanted}")


@pytest.fixture
def deployed(address: str) -> Iterator[Callable[..., None]]:
    """Return `deployed(application, ...)`: deploys these beside the shared ones, and no others."""
    before = copy.deepcopy(DEPLOYED)

    def deploy_too(*applications: dict[str, Any]) -> None:
        deploy(before | {"applications": [*before["applications"], *applications]})

    yield deploy_too
    deploy(before)


@pytest.mark.slow
def test_tiers_share_the_gpus_and_leave_them(deployed: Callable[..., None]) -> None:
    dev, klein = application(DEV, 2, priority=1), application(KLEIN, 1, priority=0)
    deployed(dev, klein)
    shares = Shares()
    shares.wait(dev=1, klein=1)
    shares.bring_work(KLEIN)
    shares.wait(dev=1, klein=4)
    # dev has the higher priority, and gets the GPUs that klein gives up.
    shares.bring_work(DEV)
    shares.wait(dev=2, klein=2)
    # With other arguments Serve makes a new policy object in place of the one before.
    dev["args"]["autoscaling"]["priority"] = -1
    deployed(dev, klein)
    shares.wait(dev=1, klein=4)
    assert shares.most_gpus <= BUDGET
    # A tier that was deleted holds nothing.
    deployed(dev)
    shares.wait(dev=3)
