"""The actor around the ledger, without Ray: when it looks at what nobody tells it."""

import asyncio
import time

import pytest

from flux_ray.router import ledger, ledger_actor
from flux_ray.router.ledger import Offer, Statement
from flux_ray.router.ledger_actor import LedgerActor

REPLICAS = {"tiny": ("one",)}
OFFER = Offer("ours", "tiny", 30.0, 600.0)


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


async def test_what_a_reply_tells_is_told_to_who_listens_too_but_without_haste(monkeypatch):
    """The reply may be lost. Where it is not, telling it again at once is work for nothing."""
    monkeypatch.setattr(ledger_actor, "LISTEN_S", 0.2)
    actor = LedgerActor()
    listening = asyncio.create_task(actor.listen("alive", 0))
    await asyncio.sleep(0)
    heard = await actor.say("alive", Statement((OFFER,), replicas=REPLICAS))
    assert [each.replica for each in heard.decisions] == ["one"]
    await asyncio.sleep(0.05)
    assert not listening.done()
    assert await listening == (1, list(heard.decisions))
    assert await actor.listen("alive", 1) == (1, [])
    actor._ticker.cancel()


async def test_a_reply_tells_nothing_of_other_gateways():
    actor = LedgerActor()
    first, second = (Offer(name, "tiny", 30.0, 600.0) for name in ("first", "second"))
    await actor.say("one", Statement((first,), replicas=REPLICAS))
    assert (await actor.say("two", Statement((second,), replicas=REPLICAS))).decisions == ()
    assert (await actor.say("one", Statement(ended=("first",)))).decisions == ()
    [decision] = (await actor.listen("two", 0))[1]
    assert (decision.ticket_id, decision.replica) == ("second", "one")
    actor._ticker.cancel()


async def test_a_gateway_hears_whether_it_is_alone(silence_s):
    actor = LedgerActor()
    assert not (await actor.say("one", Statement(replicas=REPLICAS))).is_alone
    await asyncio.sleep(1.2 * silence_s)
    assert (await actor.say("one", Statement(replicas=REPLICAS))).is_alone
    assert not (await actor.say("two", Statement(replicas=REPLICAS))).is_alone
    assert not (await actor.say("one", Statement(replicas=REPLICAS))).is_alone
    actor._ticker.cancel()
