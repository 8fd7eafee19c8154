"""A gateway's side of the ledger, over a real ledger that can be lost with all it knows."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial

import pytest

from flux_ray.errors import DeadlineTooShort, Overloaded
from flux_ray.router import turns as turns_module
from flux_ray.router.ledger import Decision, Heard, Ledger, Offer, Statement
from flux_ray.router.queue import TierQueue
from flux_ray.router.ticket import Refusal
from flux_ray.router.turns import LedgerLost, Turns, error_for


class FakeLine:
    """A ledger in this process. `lose` forgets all it knows, and what was not heard yet."""

    def __init__(self) -> None:
        self.lose()
        self.is_down = False
        self.loses_replies = False
        self.is_alone = False
        self.offers: list[Offer] = []
        self.num_told = 0

    def lose(self) -> None:
        self.ledger = Ledger(TierQueue)
        self.decided: list[Decision] = []

    async def say(self, gateway: str, statement: Statement) -> Heard:
        if self.is_down:
            raise LedgerLost
        self.offers += statement.offers
        self.num_told += bool(statement.offers or statement.ended)
        unknown = self.ledger.hear(gateway, statement, time.monotonic())
        told = self.ledger.decide(time.monotonic()).get(gateway, [])
        self.decided += told
        if self.loses_replies:
            raise LedgerLost
        return Heard(unknown, tuple(told), self.is_alone)

    async def listen(self, gateway: str, heard: int) -> tuple[int, list[Decision]]:
        await asyncio.sleep(0.001)
        if self.is_down:
            raise LedgerLost
        decided, self.decided = self.decided, []
        return heard + len(decided), decided

    def running_s(self) -> float:
        return self.ledger.backlog("tiny", time.monotonic()).running_s


@pytest.fixture
def line() -> FakeLine:
    return FakeLine()


@pytest.fixture
async def turns(line: FakeLine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Turns]:
    """Of a gateway that reaches one replica, `a`."""
    monkeypatch.setattr(turns_module, "BEAT_S", 0.01)
    monkeypatch.setattr(turns_module, "AGAIN_S", 0.01)
    turns = Turns(line, lambda: {"tiny": ("a",)}, "g")
    yield turns
    turns.stop()


def offer(ticket_id: str, cost_s: float = 10.0, deadline_in_s: float = 60.0) -> Offer:
    return Offer(ticket_id, "tiny", cost_s, deadline_in_s)


async def within(awaitable, seconds: float = 2.0):
    async with asyncio.timeout(seconds):
        return await awaitable


async def test_one_after_the_other(turns: Turns) -> None:
    assert await within(turns.take(offer("x"))) == "a"
    second = asyncio.create_task(turns.take(offer("y")))
    await asyncio.sleep(0.05)
    assert not second.done()
    turns.end("x")
    assert await within(second) == "a"


async def test_a_refusal_says_when_to_come_back_in_whole_seconds(turns: Turns) -> None:
    await within(turns.take(offer("x")))
    with pytest.raises(Overloaded) as caught:
        await within(turns.take(offer("y", cost_s=5, deadline_in_s=6)))
    assert caught.value.retry_after_s in (9, 10)


@pytest.mark.parametrize(("free_in_s", "retry_after_s"), [(0.0, 1), (2.8, 3), (2.95, 4), (60, 63)])
def test_what_is_ahead_may_take_a_little_longer_than_priced(free_in_s, retry_after_s) -> None:
    assert error_for(Refusal("full", free_in_s)).retry_after_s == retry_after_s


async def test_a_deadline_that_nobody_could_meet_is_told_as_such(turns: Turns) -> None:
    with pytest.raises(DeadlineTooShort):
        await within(turns.take(offer("x", cost_s=5, deadline_in_s=1)))


async def test_a_client_that_leaves_gives_its_place_back(turns: Turns, line: FakeLine) -> None:
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


async def test_a_client_that_leaves_at_once_disturbs_nobody(turns: Turns) -> None:
    """It is gone before the ledger has heard of it."""
    leaver = asyncio.create_task(turns.take(offer("x")))
    await asyncio.sleep(0)
    leaver.cancel()
    assert await within(turns.take(offer("y"))) == "a"


async def test_a_lost_ledger_is_told_everything_again(turns: Turns, line: FakeLine) -> None:
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


async def test_a_grant_that_was_lost_is_made_good(turns: Turns, line: FakeLine) -> None:
    """The ledger went down after it had granted, before anybody heard of it."""
    line.is_down = True
    first = asyncio.create_task(turns.take(offer("x")))
    await asyncio.sleep(0.03)
    line.is_down = False
    assert await within(first) == "a"


async def test_a_grant_whose_reply_was_lost_is_heard_of_by_listening(turns: Turns, line: FakeLine):
    line.loses_replies = True
    assert await within(turns.take(offer("x"))) == "a"
    line.loses_replies = False
    await asyncio.sleep(0.05)
    assert line.running_s() == pytest.approx(10, abs=0.5)


async def test_a_grant_comes_with_the_reply(turns: Turns, line: FakeLine, monkeypatch) -> None:
    async def silence(_gateway: str, _heard: int) -> tuple[int, list[Decision]]:
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(line, "listen", silence)
    assert await within(turns.take(offer("x"))) == "a"
    second = asyncio.create_task(turns.take(offer("y")))
    turns.end("x")
    assert await within(second) == "a"


async def test_while_the_ledger_is_away_requests_wait(turns: Turns, line: FakeLine) -> None:
    await within(turns.take(offer("x")))
    turns.end("x")
    line.is_down = True
    waiting = asyncio.create_task(turns.take(offer("y")))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    line.is_down = False
    assert await within(waiting) == "a"


async def test_the_ledger_hears_how_long_it_still_takes(turns: Turns, line: FakeLine) -> None:
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
    turns: Turns, line: FakeLine, monkeypatch: pytest.MonkeyPatch
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


async def test_ending_what_is_not_there_changes_nothing(turns: Turns, line: FakeLine) -> None:
    turns.end("never")
    assert await within(turns.take(offer("x"))) == "a"
    turns.end("x")
    turns.end("x")
    await asyncio.sleep(0.05)
    assert line.running_s() == 0


@pytest.fixture
async def alone(turns: Turns, line: FakeLine) -> Turns:
    """Of a gateway that knows that it is."""
    line.is_alone = True
    await within(turns.take(offer("first")))
    turns.end("first")
    await asyncio.sleep(0.05)
    line.offers.clear()
    return turns


async def begins_at_once(turns: Turns, offer: Offer) -> bool:
    """Whether it has its turn before the ledger can have heard of it."""
    taking = asyncio.create_task(turns.take(offer))
    await asyncio.sleep(0)
    is_done = taking.done()
    with contextlib.suppress(DeadlineTooShort):
        await within(taking)
    return is_done


async def test_who_is_alone_takes_the_only_replica_at_once_and_tells(
    alone: Turns, line: FakeLine
) -> None:
    assert await begins_at_once(alone, offer("x"))
    await asyncio.sleep(0.05)
    [told] = line.offers
    assert (told.ticket_id, told.runs_on, told.is_news) == ("x", "a", True)
    backlog = line.ledger.backlog("tiny", time.monotonic())
    assert backlog == (0.0, pytest.approx(10, abs=0.5), pytest.approx(20, abs=0.5))
    waiting = asyncio.create_task(alone.take(offer("y")))
    await asyncio.sleep(0.03)
    assert not waiting.done()
    alone.end("x")
    assert await within(waiting) == "a"


async def test_what_was_begun_here_is_told_again_to_a_lost_ledger_as_old(
    alone: Turns, line: FakeLine
) -> None:
    assert await begins_at_once(alone, offer("x"))
    await asyncio.sleep(0.03)
    line.lose()
    await asyncio.sleep(0.1)
    assert [each.is_news for each in line.offers] == [True, False]
    assert line.running_s() == pytest.approx(10, abs=0.5)
    assert line.ledger.backlog("tiny", time.monotonic()).arrived_s == 0


async def test_who_leaves_before_it_was_told_leaves_nothing(alone: Turns, line: FakeLine) -> None:
    taking = asyncio.create_task(alone.take(offer("x")))
    await asyncio.sleep(0)
    assert taking.done()
    alone.end("x")
    await asyncio.sleep(0.05)
    assert (line.offers, line.running_s()) == ([], 0)


@pytest.mark.parametrize(
    ("replicas", "deadline_in_s"), [(("a", "b"), 60.0), ((), 60.0), (("a",), 9.0)]
)
async def test_where_there_is_something_to_decide_the_ledger_does(
    alone: Turns,
    monkeypatch: pytest.MonkeyPatch,
    replicas: tuple[str, ...],
    deadline_in_s: float,
) -> None:
    monkeypatch.setattr(alone, "_reachable", lambda: {"tiny": replicas})
    assert alone._undisputed(offer("x", deadline_in_s=deadline_in_s)) is None


async def test_a_gateway_that_may_not_be_alone_asks(turns: Turns, line: FakeLine) -> None:
    assert not await begins_at_once(turns, offer("x"))


async def test_who_hears_no_more_from_the_ledger_asks_it(alone: Turns, line: FakeLine) -> None:
    line.is_down = True
    await asyncio.sleep(0.05)
    taking = asyncio.create_task(alone.take(offer("x")))
    await asyncio.sleep(0.02)
    assert not taking.done()
    line.is_down = False
    assert await within(taking) == "a"


async def test_who_is_alone_tells_a_little_later_and_less_often(
    alone: Turns, line: FakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "BEAT_S", 60)
    # The beat that goes on is of the former length.
    await asyncio.sleep(0.05)
    line.num_told = 0
    await alone.take(offer("x"))
    alone.end("x")
    await alone.take(offer("y"))
    await asyncio.sleep(0.005)
    assert line.num_told == 0
    await asyncio.sleep(0.05)
    assert line.num_told == 1
    assert line.running_s() == pytest.approx(10, abs=0.5)


async def test_who_is_alone_tells_at_once_what_somebody_waits_for(
    alone: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "QUIET_S", 60)
    await alone.take(offer("x"))
    waiting = asyncio.create_task(alone.take(offer("y")))
    await asyncio.sleep(0.03)
    alone.end("x")
    assert await within(waiting) == "a"
