"""A gateway's side of the queue: submit requests, wait for replicas, report what has ended."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from flux_ray.errors import DeadlineTooShort, FluxError, Overloaded, not_deployed
from flux_ray.request import OnEvent
from flux_ray.router.background import AGAIN_S, keep_running, within
from flux_ray.router.ledger.messages import (
    Decision,
    Place,
    Receipt,
    Retry,
    SubmitRequest,
)
from flux_ray.router.ledger.pending import PendingRequests
from flux_ray.router.ledger.quota_client import PendingQuota
from flux_ray.router.ledger.service import LEDGER_BACK_S, LedgerLost, LedgerService
from flux_ray.router.queue import Forecast, Rejection

logger = logging.getLogger("ray.serve")

BEAT_S = 0.5
# That a request has ended is told so much later: its answer goes first.
QUIET_S = 0.005
# The work ahead of a request may take so much longer than priced, and who comes back at the
# promised moment would be refused again.
OVERRUN = 0.05
# Serve tells all processes of a new replica within that time.
REACH_S = 1.0

Reachable = Callable[[], Mapping[str, tuple[str, ...]]]


class LedgerClient:
    """Submit this gateway's requests to the ledger and wait for its decisions.

    One task reports, one at a time; another listens for later decisions. `reachable` returns the
    replicas by tier; `cold_starts`: seconds until a replica of a tier has started, where known.
    """

    def __init__(
        self,
        line: LedgerService,
        reachable: Reachable,
        gateway: str,
        cold_starts: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._cold_starts = cold_starts
        self._line = line
        self._reachable = reachable
        self._gateway = gateway
        self._book = PendingRequests()
        self._news = asyncio.Event()
        self._heard = Receipt()
        self._tasks: list[asyncio.Task[None]] = []
        # By ticket, whose turn is still to come, and of which tier.
        self._waiting: dict[str, tuple[str, asyncio.Future[str]]] = {}

    def start(self) -> None:
        """Talk to the ledger from now on, also while there is nothing to ask."""
        if not self._tasks:
            self._tasks = [
                keep_running(self._speak, "what tells the ledger"),
                keep_running(self._listen, "what hears the ledger"),
            ]

    async def take(
        self,
        offer: SubmitRequest,
        on_event: OnEvent | None = None,
        quota: PendingQuota | None = None,
    ) -> str:
        """Wait for the replica whose turn it is. `on_event` is told where it stands meanwhile.

        `quota` is asked for in the same message: RateLimited or QuotaTooSmall if it is too much.
        Overloaded if the ledger refuses, or by the deadline if it says nothing; TierUnavailable if
        the tier is lost. Cancelling gives the turn back. Else `end` has to be called once.
        """
        self.start()
        granted: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def decide(decision: Decision) -> None:
            if granted.done():
                return
            if decision.replica is not None:
                granted.set_result(decision.replica)
            elif decision.limit is not None and quota is not None:
                granted.set_exception(quota.refuse(decision.limit))
            elif decision.refusal is not None:
                granted.set_exception(error_for(decision.refusal))

        self._book.ask(offer, time.monotonic(), decide, on_event, quota)
        self._waiting[offer.ticket_id] = offer.tier, granted
        self._news.set()
        late = Overloaded("its deadline came before its turn", None, LEDGER_BACK_S)
        try:
            # The ledger may hang.
            async with within(offer.deadline_in_s, late):
                replica = await granted
            await self._reach(offer.tier, replica)
            return replica
        except BaseException:
            self.end(offer.ticket_id)
            raise
        finally:
            self._waiting.pop(offer.ticket_id, None)

    def lose(self, tier: str) -> None:
        """No turn of that tier will come any more."""
        for waits_for, granted in self._waiting.values():
            if waits_for == tier and not granted.done():
                granted.set_exception(not_deployed(tier))

    async def forecast(self, offers: tuple[SubmitRequest, ...]) -> tuple[Forecast, ...]:
        """What would become of each of them alone; the best where the ledger is away."""
        try:
            return await self._line.forecast(offers)
        except LedgerLost as error:
            logger.warning("tiers are chosen without the ledger: %s", error)
            return (Forecast(0.0),) * len(offers)

    async def places(self, retry: Retry) -> tuple[Place, ...]:
        """Where it may be drawn already, the latest first; none where the ledger is away."""
        try:
            return await self._line.places(retry.name)
        except LedgerLost as error:
            logger.warning("what comes again may be drawn again: %s", error)
            return ()

    def progress(self, ticket_id: str, left_s: float) -> None:
        """So long the request whose turn it is still takes; the ledger hears of it in a while.

        That its replica is free, which is before the answer is here, it hears at once.
        """
        self._book.progress(ticket_id, left_s, time.monotonic())
        if left_s <= 0:
            self._news.set()

    def end(self, ticket_id: str, *, is_done: bool = False) -> None:
        """The turn is over; `is_done`: with what was wanted of it."""
        if self._book.end(ticket_id, is_done=is_done):
            asyncio.get_running_loop().call_later(QUIET_S, self._news.set)

    def stop(self) -> None:
        """Talk to the ledger no more."""
        for task in self._tasks:
            task.cancel()

    async def _reach(self, tier: str, replica: str) -> None:
        """Wait a moment for a replica of which the ledger knows already, and this gateway not."""
        end = time.monotonic() + REACH_S
        while replica not in self._reachable().get(tier, ()):
            if time.monotonic() >= end:
                return
            await asyncio.sleep(0.01)

    async def _speak(self) -> None:
        """Make one statement after the other."""
        while True:
            is_beat = not self._book.has_to_tell_all and await self._wait_for_news()
            self._news.clear()
            statement = self._book.statement(
                time.monotonic(), self._reachable(), self._cold_starts, is_beat=is_beat
            )
            try:
                reply = await self._line.say(self._gateway, statement)
            except LedgerLost as error:
                logger.warning("the ledger did not hear: %s", error)
                self._book.missed()
                await asyncio.sleep(AGAIN_S)
                continue
            except BaseException:
                self._book.missed()
                raise
            if self._book.heard(reply, time.monotonic()):
                self._news.set()

    async def _wait_for_news(self) -> bool:
        """Whether there were none for a beat."""
        try:
            await asyncio.wait_for(self._news.wait(), BEAT_S)
        except TimeoutError:
            return True
        return False

    async def _listen(self) -> None:
        """Hear what is decided later than at once."""
        while True:
            try:
                heard, decisions = await self._line.listen(self._gateway, self._heard)
            except LedgerLost:
                await asyncio.sleep(AGAIN_S)
                continue
            self._book.decide(decisions, time.monotonic())
            self._heard = heard


def error_for(refusal: Rejection) -> FluxError:
    """When to come back, in whole seconds; or that it is of no use."""
    if math.isinf(refusal.retry_after_s):
        return DeadlineTooShort(refusal.reason)
    away_s = (1 + OVERRUN) * refusal.retry_after_s
    return Overloaded(refusal.reason, None, max(1, math.ceil(away_s)))
