"""A gateway's side of the ledger, over a real ledger that can be lost with all it knows."""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial

import pytest

from flux_ray.errors import DeadlineTooShort, Overloaded, TierUnavailable
from flux_ray.request import QueuePosition, RequestEvent
from flux_ray.router import background
from flux_ray.router.ledger import client as turns_module
from flux_ray.router.ledger.client import LedgerClient, error_for
from flux_ray.router.ledger.ledger import Ledger
from flux_ray.router.ledger.messages import (
    Decision,
    GatewayReport,
    Place,
    Receipt,
    ReportReply,
    Retry,
    SubmitRequest,
)
from flux_ray.router.ledger.service import LedgerLost
from flux_ray.router.queue.entry import Rejection
from flux_ray.router.queue.tier_queue import TierQueue


class FakeLine:
    """A ledger in this process. `lose` forgets all it knows, and what was not heard yet."""

    def __init__(self) -> None:
        self.lose()
        self.is_down = False
        self.loses_replies = False
        self.is_hanging = False
        self.submissions: list[SubmitRequest] = []

    def lose(self) -> None:
        self.ledger = Ledger(TierQueue)
        self.decided: list[Decision] = []

    async def say(self, gateway: str, statement: GatewayReport) -> ReportReply:
        if self.is_down:
            raise LedgerLost
        if self.is_hanging:
            await asyncio.get_running_loop().create_future()
        self.submissions += statement.submissions
        unknown = self.ledger.hear(gateway, statement, time.monotonic())
        told = self.ledger.decide(time.monotonic()).get(gateway, [])
        self.decided += told
        if self.loses_replies:
            raise LedgerLost
        positions = self.ledger.positions(gateway, statement.watched, time.monotonic())
        return ReportReply(unknown, tuple(told), positions)

    async def places(self, name: str) -> tuple[Place, ...]:
        if self.is_down:
            raise LedgerLost
        return self.ledger.places(name, time.monotonic())

    async def listen(self, gateway: str, receipt: Receipt) -> tuple[Receipt, list[Decision]]:
        await asyncio.sleep(0.001)
        if self.is_down:
            raise LedgerLost
        decided, self.decided = self.decided, []
        return receipt, decided

    def running_s(self) -> float:
        return self.ledger.backlog("tiny", time.monotonic()).running_s


@pytest.fixture
def line() -> FakeLine:
    return FakeLine()


@pytest.fixture
async def turns(line: FakeLine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LedgerClient]:
    """Of a gateway that reaches one replica, `a`."""
    monkeypatch.setattr(turns_module, "BEAT_S", 0.01)
    monkeypatch.setattr(turns_module, "AGAIN_S", 0.01)
    monkeypatch.setattr(background, "AGAIN_S", 0.01)
    turns = LedgerClient(line, lambda: {"tiny": ("a",)}, "g")
    yield turns
    turns.stop()


def offer(ticket_id: str, cost_s: float = 10.0, deadline_in_s: float = 60.0) -> SubmitRequest:
    return SubmitRequest(ticket_id, "tiny", cost_s, deadline_in_s)


async def within(awaitable, seconds: float = 2.0):
    async with asyncio.timeout(seconds):
        return await awaitable


async def test_one_after_the_other(turns: LedgerClient) -> None:
    assert await within(turns.take(offer("x"))) == "a"
    second = asyncio.create_task(turns.take(offer("y")))
    await asyncio.sleep(0.05)
    assert not second.done()
    turns.end("x")
    assert await within(second) == "a"


async def test_a_refusal_says_when_to_come_back_in_whole_seconds(turns: LedgerClient) -> None:
    await within(turns.take(offer("x")))
    with pytest.raises(Overloaded) as caught:
        await within(turns.take(offer("y", cost_s=5, deadline_in_s=6)))
    assert caught.value.retry_after_s in (9, 10)


@pytest.mark.parametrize(("free_in_s", "retry_after_s"), [(0.0, 1), (2.8, 3), (2.95, 4), (60, 63)])
def test_what_is_ahead_may_take_a_little_longer_than_priced(free_in_s, retry_after_s) -> None:
    assert error_for(Rejection("full", free_in_s)).retry_after_s == retry_after_s


async def test_a_deadline_that_nobody_could_meet_is_told_as_such(turns: LedgerClient) -> None:
    with pytest.raises(DeadlineTooShort):
        await within(turns.take(offer("x", cost_s=5, deadline_in_s=1)))


async def test_a_client_that_leaves_gives_its_place_back(
    turns: LedgerClient, line: FakeLine
) -> None:
    await within(turns.take(offer("x")))
    leaver = asyncio.create_task(turns.take(offer("y")))
    await asyncio.sleep(0.03)
    leaver.cancel()
    await asyncio.wait([leaver])
    third = asyncio.create_task(turns.take(offer("z")))
    turns.end("x")
    assert await within(third) == "a"
    turns.end("z")
    await asyncio.sleep(0.05)
    assert line.ledger.backlog("tiny", time.monotonic())[:2] == (0.0, 0.0)


async def test_a_client_that_leaves_at_once_disturbs_nobody(turns: LedgerClient) -> None:
    """It is gone before the ledger has heard of it."""
    leaver = asyncio.create_task(turns.take(offer("x")))
    await asyncio.sleep(0)
    leaver.cancel()
    assert await within(turns.take(offer("y"))) == "a"


async def test_a_lost_ledger_is_told_everything_again(turns: LedgerClient, line: FakeLine) -> None:
    """What runs is not granted twice; what waits gets its turn."""
    await within(turns.take(offer("x")))
    second = asyncio.create_task(turns.take(offer("y")))
    await asyncio.sleep(0.03)
    line.lose()
    await asyncio.sleep(0.1)
    assert not second.done()
    assert line.running_s() == pytest.approx(10, abs=0.5)
    turns.end("x")
    assert await within(second) == "a"


async def test_a_grant_that_was_lost_is_made_good(turns: LedgerClient, line: FakeLine) -> None:
    """The ledger went down after it had granted, before anybody heard of it."""
    line.is_down = True
    first = asyncio.create_task(turns.take(offer("x")))
    await asyncio.sleep(0.03)
    line.is_down = False
    assert await within(first) == "a"


async def test_a_grant_whose_reply_was_lost_is_heard_of_by_listening(
    turns: LedgerClient, line: FakeLine
):
    line.loses_replies = True
    assert await within(turns.take(offer("x"))) == "a"
    line.loses_replies = False
    await asyncio.sleep(0.05)
    assert line.running_s() == pytest.approx(10, abs=0.5)


async def test_a_grant_comes_with_the_reply(
    turns: LedgerClient, line: FakeLine, monkeypatch
) -> None:
    async def silence(_gateway: str, _receipt: Receipt) -> tuple[Receipt, list[Decision]]:
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(line, "listen", silence)
    assert await within(turns.take(offer("x"))) == "a"
    second = asyncio.create_task(turns.take(offer("y")))
    turns.end("x")
    assert await within(second) == "a"


async def test_while_the_ledger_is_away_requests_wait(turns: LedgerClient, line: FakeLine) -> None:
    await within(turns.take(offer("x")))
    turns.end("x")
    line.is_down = True
    waiting = asyncio.create_task(turns.take(offer("y")))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    line.is_down = False
    assert await within(waiting) == "a"


async def test_the_ledger_hears_how_long_it_still_takes(
    turns: LedgerClient, line: FakeLine
) -> None:
    await within(turns.take(offer("x")))
    turns.progress("x", 30.0)
    turns.progress("never", 30.0)
    await asyncio.sleep(0.05)
    assert line.running_s() == pytest.approx(30, abs=0.5)
    line.lose()
    await asyncio.sleep(0.1)
    assert line.running_s() == pytest.approx(30, abs=0.5), "it is told again as it was known"
    turns.end("x", is_done=True)
    await asyncio.sleep(0.05)
    assert line.running_s() == 0


async def test_the_ledger_hears_at_once_that_a_replica_is_free(
    turns: LedgerClient, line: FakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is not here yet: files are made of its images. The next one has its turn."""
    monkeypatch.setattr(turns_module, "BEAT_S", 60.0)
    line.ledger = Ledger(partial(TierQueue, lead_s=0.01))
    await within(turns.take(offer("x")))
    second = asyncio.create_task(turns.take(offer("y")))
    await asyncio.sleep(0.05)
    assert not second.done()
    turns.progress("x", 0.0)
    assert await within(second) == "a"
    turns.end("x", is_done=True)
    turns.end("y")


async def test_ending_what_is_not_there_changes_nothing(
    turns: LedgerClient, line: FakeLine
) -> None:
    turns.end("never")
    assert await within(turns.take(offer("x"))) == "a"
    turns.end("x")
    turns.end("x")
    await asyncio.sleep(0.05)
    assert line.running_s() == 0


async def test_who_waits_hears_where_and_for_how_long(turns: LedgerClient) -> None:
    await within(turns.take(offer("x")))
    heard: asyncio.Queue[RequestEvent] = asyncio.Queue()
    ahead = asyncio.create_task(turns.take(offer("y")))
    await asyncio.sleep(0.03)
    waiting = asyncio.create_task(turns.take(offer("z", 20.0, 600.0), heard.put_nowait))
    position = await within(heard.get())
    assert position == QueuePosition(1, pytest.approx(40, abs=1))
    for each in (ahead, waiting):
        each.cancel()
    await asyncio.wait([ahead, waiting])


async def test_who_waits_hears_where_though_there_is_news_all_the_time(
    turns: LedgerClient, line: FakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a busy gateway, which always has something to report."""
    await within(turns.take(offer("x")))
    speak = line.say

    async def say(gateway: str, statement: GatewayReport) -> ReportReply:
        turns.progress("x", 0.0)
        return await speak(gateway, statement)

    monkeypatch.setattr(line, "say", say)
    heard: asyncio.Queue[RequestEvent] = asyncio.Queue()
    waiting = asyncio.create_task(turns.take(offer("y"), heard.put_nowait))
    await within(heard.get())
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_ledger_that_hangs_breaks_no_deadline(turns: LedgerClient, line: FakeLine) -> None:
    line.is_hanging = True
    with pytest.raises(Overloaded) as caught:
        await within(turns.take(offer("x", 0.1, 0.2)))
    assert caught.value.retry_after_s
    line.is_hanging = False


async def test_a_mistake_of_ours_ends_neither_speaking_nor_listening(
    turns: LedgerClient, line: FakeLine, serve_log: pytest.LogCaptureFixture
) -> None:
    """Nobody asks for anything in between that would start them again."""
    mistakes = [RuntimeError("of ours"), RuntimeError("another")]
    speak = line.say

    async def say(gateway: str, statement: GatewayReport) -> ReportReply:
        if mistakes:
            raise mistakes.pop()
        return await speak(gateway, statement)

    line.say = say  # type: ignore[method-assign]
    assert await within(turns.take(offer("x"))) == "a"
    assert not mistakes
    assert "begins again" in serve_log.text


async def test_a_grant_of_a_replica_that_is_not_known_here_yet_waits_until_it_is(
    line: FakeLine,
) -> None:
    """The ledger may hear of a new replica before this gateway does."""
    seen: dict[str, tuple[str, ...]] = {}
    turns = LedgerClient(line, lambda: seen, "g")
    line.ledger.see_replicas("tiny", ("new",), time.monotonic())
    taking = asyncio.create_task(turns.take(offer("x")))
    await asyncio.sleep(0.1)
    assert not taking.done()
    seen["tiny"] = ("new",)
    assert await within(taking) == "new"
    turns.stop()


async def test_who_waits_for_a_tier_that_is_lost_is_told_at_once(
    turns: LedgerClient, line: FakeLine
):
    assert await within(turns.take(offer("first"))) == "a"
    waiting = [asyncio.create_task(turns.take(offer(f"{n}"))) for n in range(3)]
    elsewhere = asyncio.create_task(turns.take(SubmitRequest("elsewhere", "other", 10.0, 60.0)))
    await asyncio.sleep(0.05)
    turns.lose("tiny")
    for each in waiting:
        with pytest.raises(TierUnavailable, match="tiny is not deployed"):
            await within(each)
    assert not elsewhere.done()
    elsewhere.cancel()
    await asyncio.sleep(0.05)
    assert line.ledger.backlog("tiny", time.monotonic()).waiting_s == 0
    assert line.running_s() > 0, "what is drawn is drawn to its end"


async def test_where_a_request_is_that_comes_again(turns: LedgerClient, line: FakeLine) -> None:
    """While the ledger is away it is drawn anew; nobody waits."""
    retry = Retry("ours", "a ring")
    assert await turns.places(retry) == ()
    named = SubmitRequest("first", "tiny", 10.0, 60.0, retry=retry, seed=7)
    assert await turns.take(named) == "a"
    [place] = await turns.places(retry)
    assert (place.ticket_id, place.replica, place.seed) == ("first", "a", 7)
    line.lose()
    async with asyncio.timeout(30):
        while not await turns.places(retry):  # noqa: ASYNC110 - it is told by a beat
            await asyncio.sleep(0.01)
    line.is_down = True
    assert await turns.places(retry) == ()
