"""A gateway's side of the allowances, over real books that can be lost."""

import asyncio
import time

import pytest

from flux_ray.errors import QuotaSpent, QuotaTooSmall, RateLimited
from flux_ray.router.ledger import quota_client
from flux_ray.router.ledger.quota_client import QuotaClient, Reservation
from flux_ray.router.ledger.service import LedgerLost
from flux_ray.router.quotas import UNLIMITED, LimitStatus, QuotaLedger, QuotaLimits, UsageEntry, Use

ONE = QuotaLimits(max_concurrent=1)


class FakeLine:
    """The ledger in this process."""

    def __init__(self):
        self.books = QuotaLedger()
        self.is_down = False
        self.is_deaf = False
        self.num_calls = 0

    async def enter(self, gateway, quota):
        await self.reach()
        return self.books.admit(gateway, quota.entry, quota.limits, quota.rows, time.time())

    async def leave(self, gateway, entry, rows):
        await self.reach()
        if self.is_deaf:
            raise LedgerLost
        self.books.leave(gateway, entry.request_id, entry.tier, rows)

    async def share_usage(self, gateway, report):
        await self.reach()
        entries, rows, tells_all = report.entries, report.rows, report.tells_all
        return self.books.share(gateway, entries, rows, time.time(), tells_all=tells_all)

    async def reach(self):
        self.num_calls += 1
        await asyncio.sleep(0)
        if self.is_down:
            raise LedgerLost

    def used(self, key="alice"):
        return self.books._usage.of(key, time.time())


@pytest.fixture
def line(monkeypatch):
    monkeypatch.setattr(quota_client, "USAGE_PERIOD_S", 0.01)
    monkeypatch.setattr(quota_client, "AGAIN_S", 0.01)
    monkeypatch.setattr(quota_client, "LEARN_S", 0.05)
    return FakeLine()


@pytest.fixture
async def gates(line):
    gates = [QuotaClient(line, name) for name in ("g", "h")]
    yield gates
    for gate in gates:
        gate.stop()


def entry(request_id, gpu_seconds=1.0, cost_s=0.5):
    return UsageEntry(request_id, "tiny", "alice", Use(gpu_seconds, 2.0), cost_s)


async def test_gateways_count_together(gates):
    g, h = gates
    async with g.entered(entry("x"), ONE):
        with pytest.raises(RateLimited) as caught:
            async with h.entered(entry("y"), ONE):
                raise AssertionError
    assert (caught.value.retry_after_s, caught.value.limit) == (1, 1)
    async with h.entered(entry("y"), ONE):
        pass


async def test_what_is_done_costs_what_it_took(gates, line):
    async with gates[0].entered(entry("x"), ONE) as stay:
        stay.begin()
        stay.finish(0.25)
    assert line.used() == Use(0.25, 2.0)


async def test_what_fails_or_is_refused_costs_nothing(gates, line):
    with pytest.raises(RuntimeError):
        async with gates[0].entered(entry("x"), ONE) as stay:
            stay.begin()
            raise RuntimeError
    assert line.used() == Use()
    async with gates[0].entered(entry("y"), ONE):
        pass


async def test_a_client_that_leaves_pays_for_its_time(gates, line):
    async def work(begins):
        async with gates[0].entered(entry("x", 8.0, cost_s=0.2), ONE) as stay:
            if begins:
                stay.begin()
            await asyncio.sleep(10)

    for begins, least, most in ((False, 0, 0), (True, 1.5, 7.9)):
        task = asyncio.create_task(work(begins))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.01)
        assert least <= line.used().gpu_seconds <= most
    async with gates[1].entered(entry("y"), ONE):
        pass


async def test_a_day_that_is_used_up_says_so(gates):
    day = QuotaLimits(gpu_seconds_per_day=3.0)
    async with gates[0].entered(entry("x"), day) as stay:
        stay.finish(2.5)
    with pytest.raises(QuotaSpent) as caught:
        async with gates[1].entered(entry("y"), day):
            raise AssertionError
    assert (caught.value.limit, caught.value.left) == (3.0, 0.5)
    assert 1 <= caught.value.retry_after_s <= 86_400
    with pytest.raises(QuotaTooSmall):
        async with gates[1].entered(entry("z", 3.5), day):
            raise AssertionError


async def test_a_lost_ledger_forgets_no_day_and_no_place(gates, line):
    """Also what another gateway used that has gone."""
    g, h = gates
    day = QuotaLimits(gpu_seconds_per_day=3.0, max_concurrent=1)
    async with h.entered(entry("w", 0.5), day):
        async with g.entered(UsageEntry("x", "tiny", "bob", Use(1.0), 1.0), day) as stay:
            stay.finish(2.5)
        await asyncio.sleep(0.05)
        g.stop()
        line.books = QuotaLedger()
        await asyncio.sleep(0.05)
        assert line.used("bob") == Use(2.5, 0.0)
        with pytest.raises(RateLimited):
            async with h.entered(entry("y", 0.5), day):
                raise AssertionError


async def test_while_the_ledger_is_away_requests_wait(gates, line):
    line.is_down = True

    async def generate():
        async with gates[0].entered(entry("x"), ONE):
            return "done"

    task = asyncio.create_task(generate())
    await asyncio.sleep(0.05)
    assert not task.done()
    line.is_down = False
    assert await asyncio.wait_for(task, 1) == "done"


async def test_an_end_that_the_ledger_did_not_hear_is_told_again(gates, line):
    line.is_deaf = True
    async with gates[0].entered(entry("x"), ONE) as stay:
        stay.finish(0.25)
    await asyncio.sleep(0.05)
    assert line.used() == Use(0.25, 2.0)
    async with gates[1].entered(entry("y"), ONE):
        pass


async def test_what_is_known_is_not_told_again(gates, line, monkeypatch):
    told = []
    share = line.share_usage

    async def note(gateway, report):
        shared = await share(gateway, report)
        told.append(len(report.rows) + len(shared.rows))
        return shared

    monkeypatch.setattr(line, "share_usage", note)
    for name in "xyz":
        async with gates[0].entered(entry(name), ONE) as stay:
            stay.finish(0.5)
        await asyncio.sleep(0.03)
    assert sum(told[1:]) == 3
    line.books = QuotaLedger()
    await asyncio.sleep(0.05)
    assert line.used() == Use(1.5, 6.0)


async def test_who_is_not_limited_costs_no_call(gates, line):
    async with gates[0].entered(entry("x"), UNLIMITED) as stay:
        stay.finish(1.0)
    assert line.num_calls == 0


async def test_how_a_key_stands_is_known_after_it_came_in(gates, line):
    minute = QuotaLimits(requests_per_minute=3)
    assert gates[0].standing("alice") is None
    async with gates[0].entered(entry("x"), minute):
        assert gates[0].standing("alice")[:2] == (3, 2)
    async with gates[0].entered(entry("y"), minute):
        pass
    standing = gates[0].standing("alice")
    assert standing[:2] == (3, 1) and 59 < standing.reset_s <= 60
    gates[0]._standings["alice"] = (LimitStatus(3, 1, 5.0), time.monotonic() - 7)
    assert gates[0].standing("alice").reset_s == 0, "never in the past"
    async with gates[0].entered(entry("z"), ONE):
        assert gates[0].standing("alice") is None, "its class has changed"


async def test_a_ledger_of_before_says_nothing_of_it(gates, line, monkeypatch):
    async def enter(*args):
        return None

    monkeypatch.setattr(line, "enter", enter)
    async with gates[0].entered(entry("x"), ONE):
        assert gates[0].standing("alice") is None


async def test_what_was_used_today_is_known_at_every_gateway(gates, line):
    """Also at one that the key never came to."""
    g, h = gates
    day = QuotaLimits(gpu_seconds_per_day=10)
    async with g.entered(entry("x"), day) as stay:
        stay.finish(2.5)
    assert await h.used_today("alice") == Use(2.5, 2.0)
    async with h.entered(entry("y", 4.0), day):
        assert await h.used_today("alice") == Use(6.5, 4.0)
    assert await h.used_today("bob") == Use()


async def test_what_was_used_here_is_known_without_the_ledger(gates, line):
    async with gates[0].entered(entry("x"), ONE) as stay:
        stay.finish(2.5)
    line.is_down = True
    assert (await gates[0].used_today("alice")).gpu_seconds == 2.5
    assert await gates[1].used_today("alice") == Use()


async def test_refusals_are_counted_by_their_limit(line):
    counted = []
    gate = QuotaClient(line, "g", lambda tier, limit: counted.append((tier, limit)))
    both = QuotaLimits(max_concurrent=1, gpu_seconds_per_day=3)
    async with gate.entered(entry("x"), both):
        for name, gpu_seconds in (("y", 1.0), ("z", 5.0)):
            with pytest.raises((RateLimited, QuotaTooSmall)):
                async with gate.entered(entry(name, gpu_seconds), both):
                    raise AssertionError
    with pytest.raises(QuotaTooSmall):
        async with gate.entered(entry("z", 5.0), both):
            raise AssertionError
    assert counted == [("tiny", "max_concurrent")] * 2 + [("tiny", "gpu_seconds_per_day")]
    gate.stop()


def test_waiting_for_a_second_replica_is_not_charged():
    stay = Reservation(Use(8.0, 1.0), cost_s=1e-9)
    stay.begin()
    stay.pause()
    stay.break_off()
    assert stay.use == Use()
    stay.begin()
    stay.break_off()
    assert stay.use.gpu_seconds > 0
