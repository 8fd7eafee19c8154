"""A gateway's side of the queue: submit requests, wait for replicas, report what has ended."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
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
from flux_ray.tracing import LEDGER_WAIT, span

logger = logging.getLogger("ray.serve")

# So often, a report names all that this gateway knows.
BEAT_S = 0.5
# The end of a request is reported this much later, so that its answer goes to the client first.
QUIET_S = 0.005
# The work ahead of a request may take this much longer than priced. Without it in Retry-After, a
# client that comes back at the promised moment would be refused again.
OVERRUN = 0.05
# Serve tells all processes of a new replica within this time.
REACH_S = 1.0

Reachable = Callable[[], Mapping[str, tuple[str, ...]]]


def ignore(seconds: float) -> None:
    """Count nothing: the default of a client without metrics."""


class LedgerClient:
    """Submit this gateway's requests to the ledger and wait for its decisions.

    One task reports, one at a time; another listens for later decisions. `reachable` returns the
    replicas by tier; `cold_starts`: seconds until a replica of a tier has started, where known.
    `hear` is called with the seconds that the ledger took to answer each report.
    """

    def __init__(
        self,
        ledger: LedgerService,
        reachable: Reachable,
        gateway: str,
        cold_starts: Mapping[str, float] = MappingProxyType({}),
        hear: Callable[[float], None] = ignore,
    ) -> None:
        self._hear = hear
        self._cold_starts = cold_starts
        self._ledger = ledger
        self._reachable = reachable
        self._gateway = gateway
        self._requests = PendingRequests()
        self._news = asyncio.Event()
        self._heard = Receipt()
        # When a report next names all that this gateway knows, whether or not there is news.
        self._beat_at = time.monotonic() + BEAT_S
        self._tasks: list[asyncio.Task[None]] = []
        # Requests that wait for a replica, by ticket: their tier, and where its name will be.
        self._waiting: dict[str, tuple[str, asyncio.Future[str]]] = {}

    def start(self) -> None:
        """Start the tasks that report and listen; they go on while no request waits."""
        if not self._tasks:
            self._tasks = [
                keep_running(self._speak, "what tells the ledger"),
                keep_running(self._listen, "what hears the ledger"),
            ]

    async def take(
        self,
        submission: SubmitRequest,
        on_event: OnEvent | None = None,
        quota: PendingQuota | None = None,
    ) -> str:
        """Submit a request, wait for its turn, and return the replica it is assigned.

        `on_event` is called with its queue positions. `quota` is asked for in the same message:
        RateLimited or QuotaTooSmall if it is too much. Overloaded if the queue refuses or says
        nothing by the deadline; TierUnavailable if the tier ends. If this returns, call `end` once.
        """
        self.start()
        assigned: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def decide(decision: Decision) -> None:
            if assigned.done():
                return
            if decision.replica is not None:
                assigned.set_result(decision.replica)
            elif decision.limit is not None and quota is not None:
                assigned.set_exception(quota.refuse(decision.limit))
            elif decision.rejection is not None:
                assigned.set_exception(error_for(decision.rejection))

        self._requests.ask(submission, time.monotonic(), decide, on_event, quota)
        self._waiting[submission.ticket_id] = submission.tier, assigned
        self._news.set()
        try:
            return await self._replica_for(submission, assigned)
        except BaseException:
            self.end(submission.ticket_id)
            raise
        finally:
            self._waiting.pop(submission.ticket_id, None)

    async def _replica_for(self, submission: SubmitRequest, assigned: "asyncio.Future[str]") -> str:
        """Wait for the replica, and until it can be reached; Overloaded after the deadline."""
        late = Overloaded("its deadline came before its turn", None, LEDGER_BACK_S)
        with span(LEDGER_WAIT) as waiting:
            # A ledger that hangs must not keep the client for longer than that.
            async with within(submission.deadline_in_s, late):
                replica = await assigned
            await self._reach(submission.tier, replica)
            waiting.set_attribute("flux.replica", replica)
        return replica

    def lose(self, tier: str) -> None:
        """Fail all requests that wait for a replica of a tier that has ended."""
        for waits_for, assigned in self._waiting.values():
            if waits_for == tier and not assigned.done():
                assigned.set_exception(not_deployed(tier))

    async def forecast(self, submissions: tuple[SubmitRequest, ...]) -> tuple[Forecast, ...]:
        """Predict what would become of each request alone; no wait at all if the ledger is away."""
        try:
            return await self._ledger.forecast(submissions)
        except LedgerLost as error:
            logger.warning("tiers are chosen without the ledger: %s", error)
            return (Forecast(0.0),) * len(submissions)

    async def places(self, retry: Retry) -> tuple[Place, ...]:
        """Return where the request runs or ran, the latest first; nowhere if the ledger is away."""
        try:
            return await self._ledger.places(retry.name)
        except LedgerLost as error:
            logger.warning("what comes again may be drawn again: %s", error)
            return ()

    def progress(self, ticket_id: str, left_s: float) -> None:
        """Note how many seconds a running request still takes; the next report tells the ledger.

        Zero is reported at once: the replica is free then, before its answer has arrived here.
        """
        self._requests.progress(ticket_id, left_s, time.monotonic())
        if left_s <= 0:
            self._news.set()

    def end(self, ticket_id: str, *, is_done: bool = False) -> None:
        """End a request; `is_done` if it succeeded. An unknown one is ignored."""
        if self._requests.end(ticket_id, is_done=is_done):
            asyncio.get_running_loop().call_later(QUIET_S, self._news.set)

    def stop(self) -> None:
        """Cancel the tasks that report and listen."""
        for task in self._tasks:
            task.cancel()

    async def _reach(self, tier: str, replica: str) -> None:
        """Wait up to `REACH_S` for a replica that the ledger knows before this gateway does."""
        end = time.monotonic() + REACH_S
        while replica not in self._reachable().get(tier, ()):
            if time.monotonic() >= end:
                return
            await asyncio.sleep(0.01)

    async def _speak(self) -> None:
        """Send one report after the other; repeat what a lost one told."""
        while True:
            is_beat = self._requests.has_to_tell_all or await self._wait_for_news()
            self._news.clear()
            asked_at = time.monotonic()
            report = self._requests.report(
                asked_at, self._reachable(), self._cold_starts, is_beat=is_beat
            )
            if is_beat:
                self._beat_at = asked_at + BEAT_S
            try:
                reply = await self._ledger.say(self._gateway, report)
            except LedgerLost as error:
                logger.warning("the ledger did not hear: %s", error)
                self._requests.missed()
                await asyncio.sleep(AGAIN_S)
                continue
            except BaseException:
                self._requests.missed()
                raise
            now = time.monotonic()
            self._hear(now - asked_at)
            if self._requests.heard(reply, now):
                self._news.set()

    async def _wait_for_news(self) -> bool:
        """Wait for news, at most until the next beat; return whether it is time for that."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), self._beat_at - time.monotonic())
            return time.monotonic() >= self._beat_at
        return True

    async def _listen(self) -> None:
        """Receive the decisions that the replies to reports do not bring."""
        while True:
            try:
                heard, decisions = await self._ledger.listen(self._gateway, self._heard)
            except LedgerLost:
                await asyncio.sleep(AGAIN_S)
                continue
            self._requests.decide(decisions, time.monotonic())
            self._heard = heard


def error_for(rejection: Rejection) -> FluxError:
    """Return the error for a refusal: retry after whole seconds, or that waiting does not help."""
    if math.isinf(rejection.retry_after_s):
        return DeadlineTooShort(rejection.reason)
    away_s = (1 + OVERRUN) * rejection.retry_after_s
    return Overloaded(rejection.reason, None, max(1, math.ceil(away_s)))
