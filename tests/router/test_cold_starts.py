"""What a tier's args say that a replica takes to start, on its way to what a refusal says."""

import asyncio
from types import SimpleNamespace

import pytest

from flux_ray.config.tier import TierArgs
from flux_ray.request import PROTOCOL
from flux_ray.router.autoscaling.policy import LedgerPolicy
from flux_ray.router.dispatch import learn_layouts
from flux_ray.router.ledger.actor import LedgerActor
from flux_ray.router.ledger.ledger import Ledger
from flux_ray.router.ledger.messages import Decision, GatewayReport, ReportReply, SubmitRequest
from flux_ray.router.ledger.pending import PendingRequests
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.wire import Description

TIER = "flux-2-klein-4b"
OFFER = SubmitRequest("x", TIER, 1.0, 100.0)
SAYS = "no replica is up, and one takes 300 s to start"

pytestmark = pytest.mark.parametrize(
    ("cold_start_s", "expected"), [(50.0, None), (300.0, SAYS)], ids=["short", "long"]
)


def reason_of(decisions: list[Decision]) -> str | None:
    """Return what the refusal says, or None if nothing was decided: the request waits."""
    reasons = [each.rejection.reason for each in decisions if each.rejection is not None]
    assert len(reasons) == len(decisions), "nobody can be granted a replica"
    return reasons[0] if reasons else None


def test_what_a_replica_says_of_its_tier_changes_what_is_refused(
    cold_start_s: float, expected: str | None
) -> None:
    """From its description through the gateway's turn book to the ledger."""
    args = TierArgs(
        tier=TIER, weights="w", autoscaling={"max_replicas": 2, "cold_start_s": cold_start_s}
    )
    cold_starts: dict[str, float] = {}
    learn = learn_layouts(CostModel({TIER: ReplicaSpec("h100-80gb")}), "h100-80gb", cold_starts)
    fields = args.model_dump(mode="json")
    learn(TIER, (Description(PROTOCOL, "r", "a layout", fields, None, 1.0),))
    book, ledger = PendingRequests(), Ledger(TierQueue)
    decided: list[Decision] = []
    book.ask(OFFER, 0.0, decided.append)
    unknown = ledger.hear("g", book.report(0.0, {TIER: ()}, cold_starts), 0.0)
    book.heard(ReportReply(unknown, tuple(ledger.decide(0.0).get("g", ()))), 0.0)
    assert reason_of(decided) == expected


async def test_what_a_scaling_policy_says_of_its_tier_changes_what_is_refused(
    cold_start_s: float, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No replica of the tier has ever been up, so no gateway knows."""

    async def never_connected(tier: str) -> None:
        await asyncio.Event().wait()

    actor = LedgerActor(connect=never_connected, rejoin_s=0.0)
    policy = LedgerPolicy(TIER, {"target_wait_s": 30.0, "cold_start_s": cold_start_s})
    monkeypatch.setattr(policy, "_ledger", actor)
    context = SimpleNamespace(
        current_num_replicas=0,
        target_num_replicas=0,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=2,
    )
    policy(context)  # type: ignore[arg-type]
    assert policy._asking is not None
    await policy._asking
    heard = await actor.say("g", GatewayReport((OFFER,), replicas={TIER: ()}))
    assert reason_of(list(heard.decisions)) == expected
    assert actor._ticker is not None
    actor._ticker.cancel()
