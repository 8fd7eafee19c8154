"""The actor around the ledger, without Ray: when it looks at what nobody tells it."""

import asyncio
import time

import pytest

from flux_ray.router import ledger
from flux_ray.router.ledger import Offer, Statement
from flux_ray.router.ledger_actor import LedgerActor

REPLICAS = {"tiny": ("one",)}


@pytest.fixture
def silence_s(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(ledger, "SILENCE_S", 0.3)
    return 0.3


async def test_a_dead_gateway_is_forgotten_while_others_speak_all_the_time(silence_s):
    actor = LedgerActor()
    dead, alive = (Offer(name, "tiny", 30.0, 600.0) for name in ("dead", "alive"))
    await actor.say("dead", Statement((dead,), replicas=REPLICAS))
    assert (await actor.listen("dead", 0))[1][0].replica == "one"
    end = time.monotonic() + 20 * silence_s
    await actor.say("alive", Statement((alive,), replicas=REPLICAS))
    listening = asyncio.create_task(actor.listen("alive", 0))
    while not listening.done():
        assert time.monotonic() < end, "the dead one's request still holds the replica"
        await actor.say("alive", Statement(replicas=REPLICAS))
        await asyncio.sleep(0.01)
    [decision] = listening.result()[1]
    assert (decision.ticket_id, decision.replica) == ("alive", "one")
    actor._ticker.cancel()
