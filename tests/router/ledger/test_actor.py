"""The actor around the ledger, without Ray: when it looks at what nobody tells it."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import RaySystemError

from flux_ray.router.ledger import actor as ledger_actor
from flux_ray.router.ledger import hung_processes, ledger
from flux_ray.router.ledger import remote as remote_ledger
from flux_ray.router.ledger.actor import LedgerActor
from flux_ray.router.ledger.messages import (
    GatewayReport,
    QuotaRequest,
    Receipt,
    Retry,
    SubmitRequest,
    UsageReport,
)
from flux_ray.router.ledger.remote import RemoteLedger
from flux_ray.router.ledger.service import LedgerLost
from flux_ray.router.quotas import LimitExceeded, LimitStatus, QuotaLimits, UsageEntry, Use

REPLICAS = {"tiny": ("one",)}
OFFER = SubmitRequest("ours", "tiny", 30.0, 600.0)


async def never_connected(tier: str) -> None:
    """Serve is not heard of."""
    await asyncio.Event().wait()


def new_actor(**options) -> LedgerActor:
    """In this process, without Ray; it decides from the first moment on."""
    return LedgerActor(connect=never_connected, **{"rejoin_s": 0.0} | options)


@pytest.fixture
def silence_s(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(ledger, "SILENCE_S", 0.3)
    return 0.3


async def test_a_dead_gateway_is_forgotten_while_others_speak_all_the_time(silence_s):
    actor = new_actor()
    dead, alive = (SubmitRequest(name, "tiny", 0.5, 600.0) for name in ("dead", "alive"))
    await actor.say("dead", GatewayReport((dead,), replicas=REPLICAS))
    assert (await actor.listen("dead", Receipt()))[1][0].replica == "one"
    end = time.monotonic() + 20 * silence_s
    await actor.say("alive", GatewayReport((alive,), replicas=REPLICAS))
    listening = asyncio.create_task(actor.listen("alive", Receipt()))
    while not listening.done():
        assert time.monotonic() < end, "the dead one's request still holds the replica"
        await actor.say("alive", GatewayReport(replicas=REPLICAS))
        await asyncio.sleep(0.01)
    [decision] = listening.result()[1]
    assert (decision.ticket_id, decision.replica) == ("alive", "one")
    actor._ticker.cancel()


async def test_what_a_reply_tells_is_told_to_who_listens_too_but_without_haste(monkeypatch):
    """The reply may be lost. Where it is not, telling it again at once is work for nothing."""
    monkeypatch.setattr(ledger_actor, "LISTEN_S", 0.2)
    actor = new_actor()
    listening = asyncio.create_task(actor.listen("alive", Receipt()))
    await asyncio.sleep(0)
    heard = await actor.say("alive", GatewayReport((OFFER,), replicas=REPLICAS))
    assert [each.replica for each in heard.decisions] == ["one"]
    await asyncio.sleep(0.05)
    assert not listening.done()
    receipt, decisions = await listening
    assert decisions == list(heard.decisions)
    assert await actor.listen("alive", receipt) == (receipt, [])
    actor._ticker.cancel()


async def test_a_reply_tells_nothing_of_other_gateways():
    actor = new_actor()
    first, second = (SubmitRequest(name, "tiny", 30.0, 600.0) for name in ("first", "second"))
    await actor.say("one", GatewayReport((first,), replicas=REPLICAS))
    assert (await actor.say("two", GatewayReport((second,), replicas=REPLICAS))).decisions == ()
    assert (await actor.say("one", GatewayReport(ended=("first",)))).decisions == ()
    [decision] = (await actor.listen("two", Receipt()))[1]
    assert (decision.ticket_id, decision.replica) == ("second", "one")
    actor._ticker.cancel()


async def test_the_grant_of_a_gateway_that_was_silent_is_not_lost(silence_s, monkeypatch):
    """What it heard of its former outbox counts for nothing in the new one."""
    monkeypatch.setattr(ledger_actor, "LISTEN_S", 0.05)
    actor = new_actor()
    short = SubmitRequest("ours", "tiny", 0.1, 600.0)
    await actor.say("g", GatewayReport((short,), replicas=REPLICAS))
    receipt, _ = await actor.listen("g", Receipt())
    await actor.say("other", GatewayReport(replicas=REPLICAS))
    while "g" in actor._mailboxes:
        await asyncio.sleep(0.05)
        await actor.say("other", GatewayReport())
    again = SubmitRequest("again", "tiny", 30.0, 600.0)
    await actor.say("g", GatewayReport((again,), replicas=REPLICAS))
    receipt, [decision] = await actor.listen("g", receipt)
    assert (decision.ticket_id, decision.replica) == ("again", "one")
    assert await actor.listen("g", receipt) == (receipt, [])
    actor._ticker.cancel()


async def test_a_new_ledger_decides_when_all_gateways_have_spoken():
    """What runs is told by another gateway a moment after the first has asked."""
    actor = new_actor(rejoin_s=0.3)
    assert (await actor.say("one", GatewayReport((OFFER,), replicas=REPLICAS))).decisions == ()
    running = SubmitRequest("theirs", "tiny", 30.0, 600.0, runs_on="one")
    await actor.say("two", GatewayReport((running,), replicas=REPLICAS))
    listening = asyncio.create_task(actor.listen("one", Receipt()))
    await asyncio.sleep(0.5)
    assert not listening.done()
    await actor.say("two", GatewayReport(ended=("theirs",)))
    assert (await listening)[1][0].replica == "one"
    actor._ticker.cancel()


async def test_an_unforeseen_error_ends_the_ledger(serve_log):
    ended = asyncio.Event()
    actor = new_actor(end=ended.set)
    with pytest.raises(AttributeError):
        await actor.say("g", None)
    assert ended.is_set()


async def test_an_unforeseen_error_between_calls_ends_the_ledger(serve_log):
    ended = asyncio.Event()
    actor = new_actor(end=ended.set)
    actor._ledger.forget_silent = None
    await actor.say("g", GatewayReport((OFFER,), replicas=REPLICAS))
    await ended.wait()
    assert "its ticks failed" in serve_log.text


class Silent:
    """An actor that answers nothing."""

    _actor_id = b"ledger"

    def __getattr__(self, method):
        return self

    async def remote(self, *args):
        await asyncio.Event().wait()


@pytest.fixture
def state(monkeypatch):
    """The ledger's row in Ray's table of actors."""
    row = {"State": "ALIVE", "Address": {"NodeID": "node"}, "Pid": 1}
    monkeypatch.setattr(hung_processes.ray_state, "actor_table", lambda actor_id: row)
    return row


@pytest.fixture
def killed(monkeypatch, state):
    """The actors that were killed, all to be started anew."""
    actors = []

    def kill(actor, *, no_restart):
        assert not no_restart
        actors.append(actor)

    monkeypatch.setattr(remote_ledger.ray, "kill", kill)
    return actors


async def leave_unanswered(line, number):
    for _ in range(number):
        with pytest.raises(LedgerLost):
            await line.say("g", GatewayReport())


async def test_who_waits_for_a_ledger_that_hangs_ends_it(killed, serve_log):
    line = RemoteLedger(Silent, answer_s=0.05)
    await line._connected()
    await leave_unanswered(line, remote_ledger.MAX_UNANSWERED - 1)
    assert killed == []
    await leave_unanswered(line, 1)
    line._thread.shutdown()
    assert killed == [line._actor], "it comes back under the same handle"


@pytest.mark.parametrize("starting", ["DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING"])
async def test_a_ledger_that_is_still_starting_is_not_ended(killed, state, starting):
    """Ended again and again, as by all gateways of a busy node at once, it would never be up."""
    state["State"] = starting
    line = RemoteLedger(Silent, answer_s=0.02)
    await leave_unanswered(line, 2 * remote_ledger.MAX_UNANSWERED)
    line._thread.submit(int).result()
    assert killed == []
    state["State"] = "ALIVE"
    await leave_unanswered(line, remote_ledger.MAX_UNANSWERED)
    line._thread.shutdown()
    assert killed == [line._actor], "up, and silent still"


class LookedAt:
    """The ledger's process, which stands still; `answers` is called while it is looked at."""

    def __init__(self, monkeypatch, answers=None):
        self.ended = []
        self.has_ended = asyncio.Event()
        self.answers = answers
        monkeypatch.setattr(remote_ledger, "SUSPECT_S", 0.02)
        monkeypatch.setattr(remote_ledger, "find_process", self.find)

    async def find(self, actor, thread):
        return self

    async def beside(self, remote, *args, thread):
        if remote is remote_ledger.END:
            self.ended.append(args)
            self.has_ended.set()
        elif self.answers is not None:
            await self.answers()
        return 77


async def test_a_ledger_that_stands_still_is_ended_long_before_the_call_is_given_up(monkeypatch):
    looked_at = LookedAt(monkeypatch)
    line = RemoteLedger(Silent, answer_s=60.0)
    saying = asyncio.create_task(line.say("g", GatewayReport()))
    async with asyncio.timeout(10):
        await looked_at.has_ended.wait()
    assert looked_at.ended == [(77,)]
    saying.cancel()


async def test_a_ledger_that_answers_while_it_is_looked_at_lives(monkeypatch):
    class Slow(Silent):
        async def remote(self, *args):
            await asyncio.sleep(0.2)
            return "reply"

    line = RemoteLedger(Slow, answer_s=60.0)
    looked_at = LookedAt(monkeypatch, answers=lambda: asyncio.sleep(0.5))
    assert await line.say("g", GatewayReport()) == "reply"
    assert line._look is not None
    await line._look
    assert (looked_at.ended, line._look) == ([], None)


async def test_calls_of_less_time_say_nothing_of_a_slow_ledger(killed):
    """A forecast is given a second: two of them in a slow one would end a ledger that is well."""
    line = RemoteLedger(Silent, answer_s=2 * remote_ledger.FORECAST_S)
    asked = [line.places(name) for name in "abc"] + [line.forecast(()) for _ in range(3)]
    lost = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(each) for each in lost} == {LedgerLost}
    line._thread.shutdown()
    assert killed == []


async def test_calls_from_before_there_was_a_ledger_do_not_count(killed):
    there = threading.Event()

    def start():
        there.wait()
        return Silent()

    line = RemoteLedger(start, answer_s=0.1)
    await leave_unanswered(line, remote_ledger.MAX_UNANSWERED)
    there.set()
    await leave_unanswered(line, remote_ledger.MAX_UNANSWERED - 1)
    line._thread.submit(int).result()
    assert killed == []
    await leave_unanswered(line, 1)
    line._thread.shutdown()
    assert killed == [line._actor]


async def test_a_gateway_that_stood_still_itself_ends_no_ledger(monkeypatch, killed):
    """As after SIGSTOP and SIGCONT: the answers are there, and not read yet."""
    monkeypatch.setattr(remote_ledger, "LAG_S", 0.1)
    line = RemoteLedger(Silent, answer_s=1.0)
    number = 2 * remote_ledger.MAX_UNANSWERED
    calls = [asyncio.ensure_future(line.say("g", GatewayReport())) for _ in range(number)]
    await asyncio.sleep(0.05)
    time.sleep(1.5)  # noqa: ASYNC251 - the loop stands still
    lost = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(each) for each in lost} == {LedgerLost}
    line._thread.shutdown()
    assert killed == []


async def test_while_rays_head_is_away_one_thread_waits_for_it():
    head = threading.Event()
    calls = []

    def start():
        calls.append("start")
        head.wait()
        return Silent()

    line = RemoteLedger(start, answer_s=0.05)
    for _ in range(3):
        with pytest.raises(LedgerLost):
            await line.say("g", GatewayReport())
    assert calls == ["start"]
    head.set()


async def test_what_goes_on_beside_the_ledger_begins_with_its_first_call_and_goes_on():
    """It is started again, and no failure of it ends the ledger."""
    begun = asyncio.Queue()

    async def fails():
        begun.put_nowait("begun")
        raise RuntimeError

    actor = new_actor(companion=fails)
    await asyncio.sleep(0.05)
    assert begun.empty()
    await actor.share_prices(())
    for _ in range(2):
        assert await begun.get() == "begun"
    actor._accompanying.cancel()


class Answering:
    """An actor that answers, or fails where it `is_lost`."""

    def __init__(self):
        self.is_lost = False

    def __getattr__(self, method):
        return SimpleNamespace(remote=self.answer)

    async def answer(self, *args):
        if self.is_lost:
            raise RaySystemError("nobody is there")


async def test_a_ledger_that_is_away_for_longer_than_it_takes_to_replace_it_is_not_heard():
    actor, clock = Answering(), [0.0]
    line = RemoteLedger(lambda: actor, lambda: clock[0])
    assert line.is_heard(), "nobody has asked it"
    await line.say("g", GatewayReport())
    clock[0] = 1000.0
    assert line.is_heard(), "nobody has asked it since"
    actor.is_lost = True
    for clock[0] in (1000.0, 1005.0, 1014.0):
        with pytest.raises(LedgerLost):
            await line.say("g", GatewayReport())
        assert line.is_heard(), "it may be about to come back"
    clock[0] = 1000.0 + remote_ledger.LOST_S
    assert not line.is_heard()
    actor.is_lost = False
    await line.say("g", GatewayReport())
    assert line.is_heard()


class Older:
    """The handle of an actor of older code: Ray knows its methods, and what they take."""

    class places:
        @staticmethod
        def remote():
            """Without the name."""


@pytest.mark.parametrize("call", [lambda line: line.forecast(()), lambda line: line.places("ours")])
async def test_a_ledger_that_does_not_know_a_call_is_as_one_that_does_not_answer(call):
    """Another build of the same protocol started it; who asks has an answer for that."""
    with pytest.raises(LedgerLost, match="of another version"):
        await call(RemoteLedger(Older))


async def test_who_comes_again_asks_the_actor():
    actor = new_actor()
    retry = Retry("ours", "a ring")
    named = SubmitRequest("first", "tiny", 30.0, 600.0, retry=retry, seed=7)
    await actor.say("g", GatewayReport((named,), replicas=REPLICAS))
    [place] = await actor.places("ours")
    assert (place.replica, place.seed) == ("one", 7)
    assert await actor.places("theirs") == ()
    actor._ticker.cancel()


async def test_a_clock_that_is_set_changes_no_limit_of_a_minute(monkeypatch):
    """Of the machine's date nothing is asked but which day it is."""
    actor, allowance = new_actor(), QuotaLimits(max_concurrent=2, requests_per_minute=2)

    def entry(name: str) -> UsageEntry:
        return UsageEntry(name, "tiny", "alice", Use(1.0, 1.0), 1.0)

    async def enter(name: str) -> LimitExceeded | LimitStatus | None:
        return await actor.enter("g", QuotaRequest(entry(name), allowance))

    date = [time.time()]
    monkeypatch.setattr(time, "time", lambda: date[0])
    assert isinstance(await enter("first"), LimitStatus)
    for jump_s in (3600.0, -7200.0):
        date[0] += jump_s
        await actor.share_usage("other", UsageReport((), (), True))
    assert isinstance(await enter("second"), LimitStatus)
    date[0] += 3600.0
    denial = await enter("third")
    assert isinstance(denial, LimitExceeded) and denial.name == "max_concurrent", "both are in hand"
    for name in ("first", "second"):
        await actor.leave("g", entry(name), ())
    for jump_s in (3600.0, -7200.0):
        date[0] += jump_s
        denial = await enter("third")
        assert isinstance(denial, LimitExceeded) and denial.name == "requests_per_minute"
        assert 0 < denial.retry_after_s <= 60


async def test_a_refusal_by_a_limit_is_not_told_again_to_who_was_let_in_since(monkeypatch):
    """Its reply was lost, and the gateway has sent the request again."""
    monkeypatch.setattr(ledger_actor, "LISTEN_S", 0.05)
    actor, one = new_actor(), QuotaLimits(max_concurrent=1)

    def offer(name: str) -> SubmitRequest:
        entry = UsageEntry(name, "tiny", "alice", Use(1.0, 1.0), 1.0)
        return SubmitRequest(name, "tiny", 1.0, 60.0, "alice", quota=QuotaRequest(entry, one))

    await actor.say("g", GatewayReport((offer("first"),), replicas=REPLICAS))
    lost = await actor.say("g", GatewayReport((offer("second"),), replicas=REPLICAS))
    assert [each.limit is not None for each in lost.decisions] == [True]
    await actor.leave("g", UsageEntry("first", "tiny", "alice", Use(1.0, 1.0), 1.0), ())
    again = await actor.say("g", GatewayReport((offer("second"),), replicas=REPLICAS))
    assert [ticket_id for ticket_id, _ in again.admitted] == ["second"]
    _, decisions = await actor.listen("g", Receipt())
    assert [each.limit for each in decisions if each.ticket_id == "second"] in ([], [None])
    actor._ticker.cancel()
