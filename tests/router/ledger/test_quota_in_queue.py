"""Limits and queue in one message: a ledger that counts what it is asked, and can be lost."""

import asyncio
import time

import pytest

from flux_ray.errors import Overloaded, QuotaSpent, RateLimited
from flux_ray.router.ledger import client as client_module
from flux_ray.router.ledger.client import LedgerClient
from flux_ray.router.ledger.ledger import Ledger
from flux_ray.router.ledger.messages import GatewayReport, QuotaRequest, ReportReply, SubmitRequest
from flux_ray.router.ledger.quota_client import QuotaClient
from flux_ray.router.ledger.service import LedgerLost
from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.router.quotas import QuotaLedger, QuotaLimits, UsageEntry, Use

ONE = QuotaLimits(max_concurrent=1)


class Line:
    """The ledger in this process; `asked` are the calls before which a request has to wait."""

    def __init__(self):
        self.lose()
        self.asked = []
        self.loses_replies = False
        # Nothing is heard from the outbox.
        self.is_deaf = False

    def lose(self):
        self.quotas = QuotaLedger()
        self.ledger = Ledger(TierQueue, self.quotas)
        self.decided = {}

    async def say(self, gateway, statement):
        if statement.submissions:
            self.asked.append("say")
        now = time.monotonic()
        unknown = self.ledger.hear(gateway, statement, now)
        admitted = self.ledger.admitted(now)
        for name, decisions in self.ledger.decide(now).items():
            self.decided.setdefault(name, []).extend(decisions)
        if self.loses_replies:
            raise LedgerLost
        return ReportReply(unknown, tuple(self.decided.pop(gateway, ())), (), admitted)

    async def listen(self, gateway, receipt):
        await asyncio.sleep(0.005)
        if self.is_deaf:
            raise LedgerLost
        return receipt, self.decided.pop(gateway, [])

    async def enter(self, gateway, quota):
        self.asked.append("enter")
        rows, now = quota.rows, time.monotonic()
        return self.quotas.admit(gateway, quota.entry, quota.limits, rows, now)

    async def leave(self, gateway, entry, rows):
        self.quotas.leave(gateway, entry.request_id, entry.tier, rows)

    async def share_usage(self, gateway, report):
        entries, rows, now = report.entries, report.rows, time.monotonic()
        return self.quotas.share(gateway, entries, rows, now, tells_all=report.tells_all)

    def in_hand(self):
        return {entry.request_id for entry, _ in self.quotas._running("alice", time.monotonic())}


class Side:
    """One gateway's two clients."""

    def __init__(self, line, name):
        self.queue = LedgerClient(line, lambda: {"tiny": ("a",)}, name)
        self.quotas = QuotaClient(line, name, lambda tier, limit: self.refused.append(limit))
        self.refused = []
        self.granted = []

    async def run(self, name, limits=ONE, cost_s=10.0, deadline_in_s=60.0, ends=None, gpu_s=1.0):
        offer = SubmitRequest(name, "tiny", cost_s, deadline_in_s, "alice")
        entry = UsageEntry(name, "tiny", "alice", Use(gpu_s, 1.0), cost_s)
        async with self.quotas.reserved(entry, limits) as stay:
            await self.queue.take(offer, None, stay.quota)
            try:
                stay.begin()
                self.granted.append(name)
                if ends is not None:
                    await ends.wait()
                stay.finish(gpu_s)
            finally:
                self.queue.end(name, is_done=True)


@pytest.fixture
def line(monkeypatch):
    monkeypatch.setattr(client_module, "BEAT_S", 0.02)
    monkeypatch.setattr(client_module, "AGAIN_S", 0.01)
    return Line()


@pytest.fixture
async def sides(line):
    sides = [Side(line, name) for name in ("g", "h")]
    yield sides
    for side in sides:
        side.queue.stop()
        side.quotas.stop()


async def until(is_so):
    async with asyncio.timeout(5):
        while not is_so():  # noqa: ASYNC110 - it is told by a beat
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("limits", [ONE, QuotaLimits()])
async def test_a_request_asks_once_with_limits_and_without(sides, line, limits):
    await sides[0].run("x", limits)
    assert line.asked == ["say"]
    assert line.in_hand() == set()


async def test_what_a_limit_refuses_leaves_no_trace_in_the_queue(sides, line):
    ends = asyncio.Event()
    first = asyncio.create_task(sides[0].run("x", ends=ends))
    await until(lambda: sides[0].granted)
    before = line.ledger.backlog("tiny", time.monotonic()).arrived_s
    with pytest.raises(RateLimited) as caught:
        await sides[1].run("y")
    assert (caught.value.limit, sides[1].refused) == (1, ["max_concurrent"])
    backlog = line.ledger.backlog("tiny", time.monotonic())
    assert (backlog.arrived_s, backlog.waiting_s) == (before, 0.0)
    ends.set()
    await first
    await sides[1].run("y")


async def test_what_the_queue_refuses_gives_its_place_back_at_once():
    quotas = QuotaLedger()
    ledger = Ledger(TierQueue, quotas)
    entry = UsageEntry("x", "tiny", "alice", Use(1.0, 1.0), 10.0)
    offer = SubmitRequest("x", "tiny", 10.0, 5.0, "alice", quota=QuotaRequest(entry, ONE))
    ledger.hear("g", GatewayReport((offer,), replicas={"tiny": ("a",)}), 0.0)
    [decision] = ledger.decide(0.0)["g"]
    assert decision.rejection is not None and decision.limit is None
    assert ledger.admitted(0.0) == ()
    assert quotas._running("alice", 0.0) == []


async def test_a_refusal_of_the_queue_lets_the_key_come_again(sides, line):
    ends = asyncio.Event()
    two = QuotaLimits(max_concurrent=2)
    first = asyncio.create_task(sides[0].run("x", two, ends=ends))
    await until(lambda: sides[0].granted)
    for name in "yz":
        with pytest.raises(Overloaded):
            await sides[1].run(name, two, deadline_in_s=12.0)
    assert line.in_hand() == {"x"}
    ends.set()
    await first


async def test_a_reply_that_is_lost_counts_nothing_twice(sides, line):
    minute = QuotaLimits(requests_per_minute=2)
    line.loses_replies = line.is_deaf = True
    first = asyncio.create_task(sides[0].run("x", minute))
    await until(lambda: len(line.asked) > 1)
    line.loses_replies = False
    await first
    assert sides[0].quotas.standing("alice")[:2] == (2, 1)
    await sides[0].run("y", minute)
    with pytest.raises(RateLimited):
        await sides[1].run("z", minute)


async def test_what_was_let_in_waits_on_in_a_new_ledger_whatever_came_between(sides, line):
    ends = asyncio.Event()
    runs = asyncio.create_task(sides[0].run("runs", QuotaLimits(), ends=ends))
    await until(lambda: sides[0].granted)
    waits = asyncio.create_task(sides[0].run("waits"))
    await until(lambda: line.in_hand() == {"waits"})
    await asyncio.sleep(0.02)
    line.lose()
    # Another request of the key is let in by the new ledger first.
    between = UsageEntry("between", "tiny", "alice", Use(1.0, 1.0), 1.0)
    await line.enter("h", QuotaRequest(between, ONE))
    await until(lambda: line.in_hand() == {"waits", "between"})
    assert not waits.done()
    ends.set()
    await asyncio.gather(runs, waits)
    assert sides[0].granted == ["runs", "waits"]


async def test_who_leaves_while_it_waits_pays_nothing_and_holds_nothing(sides, line):
    ends = asyncio.Event()
    runs = asyncio.create_task(sides[0].run("runs", QuotaLimits(), ends=ends))
    await until(lambda: sides[0].granted)
    waits = asyncio.create_task(sides[0].run("waits"))
    await until(lambda: line.in_hand() == {"waits"})
    waits.cancel()
    await asyncio.wait([waits])
    assert line.in_hand() == set()
    assert line.quotas._usage.of("alice", time.time()) == Use()
    ends.set()
    await runs


async def test_what_another_gateway_used_today_counts_in_the_queue_too(sides):
    day = QuotaLimits(gpu_seconds_per_day=3.0)
    await sides[0].run("x", day, gpu_s=2.5)
    with pytest.raises(QuotaSpent):
        await sides[1].run("y", day)
