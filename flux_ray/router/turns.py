"""A gateway's side of the ledger: it asks for turns, hears when they come, and tells what ended."""

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from flux_ray.errors import DeadlineTooShort, FluxError, Overloaded
from flux_ray.router.forecast import Forecast
from flux_ray.router.ledger import Decision, Heard, Offer, Statement
from flux_ray.router.ticket import Refusal

logger = logging.getLogger("ray.serve")

BEAT_S = 0.5
# News that nobody waits for come so late: the request itself, or its answer, goes first.
QUIET_S = 0.02
# Ray starts a lost ledger anew within a second or two.
AGAIN_S = 0.2
# The work ahead of a request may take so much longer than priced, and who comes back at the
# promised moment would be refused again.
OVERRUN = 0.05

Reachable = Callable[[], Mapping[str, tuple[str, ...]]]


def tell_of_end(task: "asyncio.Task[None]") -> None:
    """A mistake of ours, that somebody has to hear of."""
    if not task.cancelled():
        logger.error("this gateway talks to the ledger no more", exc_info=task.exception())


class LedgerLost(Exception):
    """The ledger did not answer; what it was told may be lost."""


class Line(Protocol):
    """The way to the ledger. All of it raises LedgerLost."""

    async def say(self, gateway: str, statement: Statement) -> Heard:
        """Make a statement; what there is to tell at once."""

    async def forecast(self, offers: tuple[Offer, ...]) -> tuple[Forecast, ...]:
        """What would become of each of them alone."""

    async def listen(self, gateway: str, heard: int) -> tuple[int, list[Decision]]:
        """Decisions after number `heard`, and the number of the last; none after a while."""


@dataclass
class Turn:
    """A request of this gateway, from its arrival to its end."""

    offer: Offer
    asked_at: float
    granted: "asyncio.Future[str]"
    replica: str | None = None
    # What was left of it when that was last known.
    left: tuple[float, float] = (math.inf, 0.0)
    # It was granted here, and the ledger has not been told.
    is_news: bool = False

    def begin(self, replica: str) -> None:
        """It is granted this replica."""
        self.replica, self.left = replica, (self.offer.cost_s, time.monotonic())
        self.granted.set_result(replica)

    def left_s(self, now: float) -> float:
        """How long it still takes, once it was granted."""
        left_s, known_at = self.left
        return max(0.0, left_s - (now - known_at))

    def offer_at(self, now: float) -> Offer:
        """The offer for a ledger that has never heard of it, or has been lost."""
        deadline_in_s = self.offer.deadline_in_s - (now - self.asked_at)
        if self.replica is None:
            return replace(self.offer, deadline_in_s=deadline_in_s)
        return replace(
            self.offer,
            deadline_in_s=deadline_in_s,
            cost_s=self.left_s(now),
            runs_on=self.replica,
            is_news=self.is_news,
        )


class Turns:
    """All requests of this gateway that wait for a turn or have one.

    Two tasks of its own talk to the ledger, in an empty context: Ray would cancel what they have
    in flight with the request that they were started by.
    """

    def __init__(self, line: Line, reachable: Reachable, gateway: str) -> None:
        self._line = line
        self._reachable = reachable
        self._gateway = gateway
        self._turns: dict[str, Turn] = {}
        self._new: list[Turn] = []
        self._ended: list[str] = []
        self._done: list[str] = []
        self._moved: set[str] = set()
        self._is_alone = False
        self._news = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def take(self, offer: Offer) -> str:
        """The replica whose turn it is, as soon as it is. Overloaded if the ledger refuses.

        Cancelling gives the turn back. Else `end` has to be called once.
        """
        self._start()
        loop = asyncio.get_running_loop()
        turn = Turn(offer, time.monotonic(), loop.create_future())
        if (replica := self._undisputed(offer)) is not None:
            turn.is_news = True
            turn.begin(replica)
        self._turns[offer.ticket_id] = turn
        self._new.append(turn)
        self._tell()
        try:
            return await turn.granted
        except BaseException:
            self.end(offer.ticket_id)
            raise

    async def forecast(self, offers: tuple[Offer, ...]) -> tuple[Forecast, ...]:
        """What would become of each of them alone; the best where the ledger is away."""
        try:
            return await self._line.forecast(offers)
        except LedgerLost as error:
            logger.warning("tiers are chosen without the ledger: %s", error)
            return (Forecast(0.0),) * len(offers)

    def progress(self, ticket_id: str, left_s: float) -> None:
        """So long the request whose turn it is still takes; the ledger hears of it in a while.

        That its replica is free, which is before the answer is here, it hears at once.
        """
        turn = self._turns.get(ticket_id)
        if turn is not None:
            turn.left = left_s, time.monotonic()
            self._moved.add(ticket_id)
            if left_s <= 0:
                self._tell()

    def end(self, ticket_id: str, *, is_done: bool = False) -> None:
        """The turn is over; `is_done`: with what was wanted of it."""
        if self._turns.pop(ticket_id, None) is not None:
            self._ended.append(ticket_id)
            if is_done:
                self._done.append(ticket_id)
            self._tell()

    def stop(self) -> None:
        """Talk to the ledger no more."""
        for task in self._tasks.values():
            task.cancel()

    def _tell(self) -> None:
        """Have the ledger told what is new."""
        if self._is_alone and all(turn.granted.done() for turn in self._turns.values()):
            asyncio.get_running_loop().call_later(QUIET_S, self._news.set)
        else:
            self._news.set()

    def _undisputed(self, offer: Offer) -> str | None:
        """The only replica, if nobody else can want it: the ledger would say the same, later."""
        if not self._is_alone or offer.cost_s > offer.deadline_in_s:
            return None
        names = self._reachable().get(offer.tier, ())
        is_idle = all(turn.offer.tier != offer.tier for turn in self._turns.values())
        return names[0] if is_idle and len(names) == 1 else None

    def _start(self) -> None:
        """Also again, after a mistake of ours: without them every request would wait in vain."""
        loop = asyncio.get_running_loop()
        for name, talk in (("speak", self._speak), ("listen", self._listen)):
            if name not in self._tasks or self._tasks[name].done():
                task = loop.create_task(talk(), context=contextvars.Context())
                task.add_done_callback(tell_of_end)
                self._tasks[name] = task

    async def _speak(self) -> None:
        is_heard = True
        while True:
            is_beat = not is_heard or await self._wait_for_news()
            statement = self._statement(tell_all=is_beat)
            try:
                heard = await self._line.say(self._gateway, statement)
            except LedgerLost as error:
                logger.warning("the ledger did not hear: %s", error)
                is_heard = self._is_alone = False
                await asyncio.sleep(AGAIN_S)
                continue
            is_heard, self._is_alone = True, heard.is_alone
            for decision in heard.decisions:
                self._hear(decision)
            lost = [self._turns[each] for each in heard.unknown if each in self._turns]
            if lost:
                self._new += lost
                self._news.set()

    async def _wait_for_news(self) -> bool:
        """Whether there were none for a beat."""
        try:
            await asyncio.wait_for(self._news.wait(), BEAT_S)
        except TimeoutError:
            return True
        return False

    def _statement(self, *, tell_all: bool) -> Statement:
        self._news.clear()
        now = time.monotonic()
        # Clients may have left already.
        new = [turn for turn in self._new if turn.offer.ticket_id in self._turns]
        offers = tuple(turn.offer_at(now) for turn in new)
        for turn in new:
            turn.is_news = False
        moved = ((each, self._turns[each]) for each in self._moved if each in self._turns)
        statement = Statement(
            offers,
            tuple(self._ended),
            self._reachable(),
            frozenset(self._turns) if tell_all else None,
            tuple(self._done),
            tuple((ticket_id, turn.left_s(now)) for ticket_id, turn in moved),
        )
        self._new, self._ended, self._done, self._moved = [], [], [], set()
        return statement

    async def _listen(self) -> None:
        heard = 0
        while True:
            try:
                heard, decisions = await self._line.listen(self._gateway, heard)
            except LedgerLost:
                heard = 0
                await asyncio.sleep(AGAIN_S)
                continue
            for decision in decisions:
                self._hear(decision)

    def _hear(self, decision: Decision) -> None:
        turn = self._turns.get(decision.ticket_id)
        if turn is None or turn.granted.done():
            return
        if decision.replica is not None:
            turn.begin(decision.replica)
        elif decision.refusal is not None:
            turn.granted.set_exception(error_for(decision.refusal))


def error_for(refusal: Refusal) -> FluxError:
    """When to come back, in whole seconds; or that it is of no use."""
    if math.isinf(refusal.retry_after_s):
        return DeadlineTooShort(refusal.reason)
    away_s = (1 + OVERRUN) * refusal.retry_after_s
    return Overloaded(refusal.reason, None, max(1, math.ceil(away_s)))
