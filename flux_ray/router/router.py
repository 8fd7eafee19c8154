"""The router prices a request, waits for its turn, and tries once more if a replica dies.

It knows neither HTTP nor Ray. What it needs of the rest of a gateway are the four protocols below:
the replicas, the ledger's queue, metrics, and a record of what arrived.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from flux_ray.config import Alias
from flux_ray.errors import (
    DeadlinePassed,
    DeadlineTooShort,
    FluxError,
    KilledForMemory,
    OutOfMemory,
    Overloaded,
    QuotaTooSmall,
    RateLimited,
    ReplicaFailed,
    TierUnavailable,
    not_deployed,
)
from flux_ray.request import ImageRequest, ImageResult, OnEvent, loaded
from flux_ray.router.accounting import RequestMetrics, promised
from flux_ray.router.background import within
from flux_ray.router.ledger.messages import Place, Retry, SubmitRequest
from flux_ray.router.ledger.quota_client import PendingQuota, QuotaClient, Reservation
from flux_ray.router.pricing import CostModel, affinity_of
from flux_ray.router.queue import Forecast
from flux_ray.router.quotas import UNLIMITED, LimitStatus, UsageEntry
from flux_ray.router.quote import (
    ANYONE,
    Caller,
    Quote,
    followed,
    quote_for,
    submission_for,
    traced,
)
from flux_ray.router.tier_choice import TierCandidate, in_order

logger = logging.getLogger("ray.serve")

# Refusals by one tier, after which an alias's next tier is tried.
REFUSALS = (Overloaded, DeadlineTooShort, TierUnavailable, RateLimited, QuotaTooSmall)


class Dispatcher(Protocol):
    """The way to the replicas of all tiers: `TierHandles`, or a fake in tests."""

    async def connect(self, tier: str) -> None:
        """Connect to a tier; raise TierUnavailable if it is not deployed."""

    async def generate(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None, run: str = ""
    ) -> ImageResult:
        """Generate on that replica, which finds it again as `run`. ReplicaFailed if it dies."""

    async def recall(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None, run: str
    ) -> ImageResult:
        """Return the images of an earlier `run`. ReplicaFailed or TierUnavailable without any."""

    async def ready_tiers(self) -> tuple[str, ...]:
        """Return the tiers that serve, or that a request would wake."""


class RequestQueue(Protocol):
    """The way to the ledger, which assigns replicas: `LedgerClient`, or a fake in tests."""

    async def take(
        self,
        submission: SubmitRequest,
        on_event: OnEvent | None = None,
        quota: PendingQuota | None = None,
    ) -> str:
        """Wait for the request's turn; return the replica that the ledger assigned to it.

        Raise Overloaded if the deadline cannot be met. `quota` is asked for in the same message:
        RateLimited or QuotaTooSmall if that is too much. `on_event` is called with its positions in
        the queue meanwhile.
        """

    async def forecast(self, submissions: tuple[SubmitRequest, ...]) -> tuple[Forecast, ...]:
        """Predict what would become of each request if it alone were submitted now."""

    async def places(self, retry: Retry) -> tuple[Place, ...]:
        """Return the replicas that run, or ran, a request that comes again, the latest first."""

    def progress(self, ticket_id: str, left_s: float) -> None:
        """Note how many seconds a running request still takes."""

    def end(self, ticket_id: str, *, is_done: bool = False) -> None:
        """End a request that had its turn; `is_done` if it succeeded."""


class Records(Protocol):
    """The record of what arrived: `Recorder`, or a fake in tests."""

    def record(
        self, request: ImageRequest, at_s: float, deadline_s: float | None, key: str = ""
    ) -> None:
        """Record a request that came at `at_s`, in seconds since 1970; never wait or raise."""


@dataclass(frozen=True)
class Terms:
    """How many seconds requests may take: by tier if the caller does not say, and at most."""

    request_timeout_s: float
    deadlines: Mapping[str, float] = field(default_factory=dict)

    def deadline_s(self, request: ImageRequest, caller: Caller) -> float:
        """Return within how many seconds this request has to be done."""
        wanted_s = caller.deadline_s or self.deadlines.get(request.tier, self.request_timeout_s)
        return min(wanted_s, self.request_timeout_s) - caller.spent_s


def entry_of(quote: Quote, caller: Caller) -> UsageEntry:
    """Return what a request counts against its caller's limits."""
    request_id = quote.request.request_id
    return UsageEntry(request_id, quote.tier, caller.key, quote.use, quote.cost_s)


def always(*about: object) -> bool:
    """Return True: the default of a router that nobody tells of tiers and ledger."""
    return True


class Router:
    """What the gateway's API and its job worker call for images, from one event loop.

    `is_deployed`: tells whether a tier is deployed. `hears_ledger`: tells whether this process can
    reach the ledger.
    """

    def __init__(
        self,
        handles: Dispatcher,
        queue: RequestQueue,
        prices: CostModel,
        metrics: RequestMetrics,
        terms: Terms,
        records: Records | None = None,
        quotas: QuotaClient | None = None,
        is_deployed: Callable[[str], bool] = always,
        hears_ledger: Callable[[], bool] = always,
    ) -> None:
        self.handles = handles
        self.queue = queue
        self.prices = prices
        self.metrics = metrics
        self.terms = terms
        self.records = records
        self.quotas = quotas
        self.is_deployed = is_deployed
        self.hears_ledger = hears_ledger

    def deployed(self, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
        """Return the requests whose tier is deployed; raise TierUnavailable if there are none."""
        found = [each for each in requests if self.is_deployed(each.tier)]
        if not found:
            error = not_deployed(requests[0].tier)
            self.metrics.refuse(requests[0].tier, error.code)
            raise error
        return found

    async def generate(self, request: ImageRequest, caller: Caller = ANYONE) -> ImageResult:
        """Generate images; if a replica dies, a second one makes the same ones from the seed."""
        self._record(request, caller)
        quote = quote_for(request, self.prices, caller.spent_gpu_s)
        deadline_s = self.terms.deadline_s(request, caller)
        with promised(self.metrics, caller, deadline_s) as try_tier:
            try_tier(quote.tier)
            return await self._generate(quote, caller, deadline_s)

    async def generate_by(
        self,
        alias: Alias,
        requests: Sequence[ImageRequest],
        caller: Caller = ANYONE,
    ) -> ImageResult:
        """Generate on the tier that the alias's policy prefers.

        `requests`: the same request for each tier, best tier first. If a tier refuses, the next is
        tried; if all do, the refusal with the shortest time to wait is raised.
        """
        if len(requests) == 1 and alias.max_gpu_seconds is None:
            return await self.generate(requests[0], caller)
        began = time.monotonic()
        refusals: list[FluxError] = []
        candidates = in_order(await self._candidates(requests, caller), alias)
        with promised(self.metrics, caller, candidates[0].deadline_s) as try_tier:
            for candidate in candidates:
                elapsed_s = time.monotonic() - began
                left_s = candidate.deadline_s - elapsed_s
                if not refusals:
                    self._record(candidate.quote.request, caller)
                elif left_s <= 0:
                    continue
                try_tier(candidate.quote.tier)
                # All tiers together have the time of one request.
                later = replace(caller, spent_s=caller.spent_s + elapsed_s)
                try:
                    return await self._generate(candidate.quote, later, left_s)
                except REFUSALS as error:
                    refusals.append(error)
            timeout_s = self.terms.request_timeout_s
            raise min(refusals, key=lambda error: error.retry_after_s or timeout_s)

    async def places(self, caller: Caller) -> tuple[Place, ...]:
        """Return the replicas that run, or ran, the caller's request before, the latest first."""
        return () if caller.retry is None else await self.queue.places(caller.retry)

    async def recall(
        self,
        places: Sequence[Place],
        requests: Sequence[ImageRequest],
        caller: Caller,
    ) -> ImageResult | None:
        """Return the images from one of these places; None if they have to be generated anew.

        It counts against no limit and waits for no turn: it did when it came first.
        """
        timeout_s = self.terms.request_timeout_s
        late = DeadlinePassed(f"the request was not done after {timeout_s:g} seconds")
        of_tiers = {request.tier: request for request in requests}
        async with within(timeout_s, late):
            for place in places:
                request = of_tiers.get(place.tier)
                if request is None or caller.retry is None:
                    continue
                try:
                    return await self.handles.recall(
                        request, place.replica, caller.on_event, caller.retry.run
                    )
                except (ReplicaFailed, TierUnavailable) as error:
                    logger.info("request %s is drawn again: %s", request.request_id, error)
        return None

    async def choose(
        self, alias: Alias, requests: Sequence[ImageRequest], caller: Caller = ANYONE
    ) -> ImageRequest:
        """Return the request for the tier that the alias's policy prefers now.

        Raise BadRequest if none is cheap enough.
        """
        if len(requests) == 1 and alias.max_gpu_seconds is None:
            return requests[0]
        return in_order(await self._candidates(requests, caller), alias)[0].quote.request

    async def count_in(self, request: ImageRequest, caller: Caller) -> None:
        """Count a request that is generated later.

        Raise RateLimited or QuotaTooSmall if it is over its key's limits.
        """
        if self.quotas is not None:
            entry = entry_of(quote_for(request, self.prices, caller.spent_gpu_s), caller)
            within_s = self.terms.deadline_s(request, caller)
            async with self.quotas.entered(entry, caller.allowance, within_s):
                pass

    def gpu_seconds(self, request: ImageRequest) -> float:
        """Return the price of a request in GPU seconds."""
        return quote_for(request, self.prices).gpu_seconds

    def gpu_seconds_of(self, result: ImageResult) -> float:
        """Return the GPU seconds that finished images took; each GPU of the replica counts."""
        return self.prices.on_all_cards(result.tier, result.times.replica_s, result.layout)

    async def ready_tiers(self) -> tuple[str, ...]:
        """Return the tiers that serve, or that a request would wake."""
        return await self.handles.ready_tiers()

    def standing(self, caller: Caller) -> LimitStatus | None:
        """Return what is left to the caller's key; None if no limit of it is known here."""
        if self.quotas is None or caller.allowance == UNLIMITED:
            return None
        return self.quotas.standing(caller.key)

    async def credits(self, caller: Caller) -> float | None:
        """Return the GPU seconds left to the caller's key today; None if it has no such limit."""
        limit = caller.allowance.gpu_seconds_per_day
        if limit is None or self.quotas is None:
            return limit
        return max(0.0, limit - (await self.quotas.used_today(caller.key)).gpu_seconds)

    async def _candidates(
        self, requests: Sequence[ImageRequest], caller: Caller
    ) -> list[TierCandidate]:
        quotes = [quote_for(request, self.prices, caller.spent_gpu_s) for request in requests]
        # Without what replicas have cached: a forecast is of the queue, not of one replica.
        submissions = tuple(
            submission_for(quote, 0, self.terms.deadline_s(quote.request, caller), caller)
            for quote in quotes
        )
        forecasts = await self.queue.forecast(submissions)
        return [
            TierCandidate(quote, submission.deadline_in_s, forecast)
            for quote, submission, forecast in zip(quotes, submissions, forecasts, strict=True)
        ]

    async def _generate(self, quote: Quote, caller: Caller, deadline_s: float) -> ImageResult:
        timeout_s = self.terms.request_timeout_s
        late = DeadlinePassed(f"the request was not done after {timeout_s:g} seconds")
        timeout_s -= caller.spent_s
        with traced(quote, caller) as span:
            async with within(timeout_s, late), self._reserved(quote, caller) as reservation:
                result = await self._generate_with_retry(quote, caller, deadline_s, reservation)
                gpu_seconds = self.gpu_seconds_of(result) + caller.spent_gpu_s
                reservation.finish(gpu_seconds)
                self.metrics.spend(quote.tier, gpu_seconds, caller.key_class)
                span.set_attribute("flux.gpu_s", gpu_seconds)
                return result

    def _reserved(self, quote: Quote, caller: Caller) -> AbstractAsyncContextManager[Reservation]:
        if self.quotas is None:
            return nullcontext(Reservation(quote.use, quote.cost_s))
        return self.quotas.reserved(entry_of(quote, caller), caller.allowance)

    async def _generate_with_retry(
        self,
        quote: Quote,
        caller: Caller,
        deadline_s: float,
        reservation: Reservation,
    ) -> ImageResult:
        began = time.monotonic()
        try:
            return await self._attempt(quote, 1, deadline_s, caller, reservation)
        except ReplicaFailed as error:
            logger.warning("request %s is sent again: %s", quote.request.request_id, error)
            self.metrics.retry(quote.tier)
            reservation.pause()
            was_killed = isinstance(error, KilledForMemory)
        # It was admitted once, and is not refused now for what was no fault of its client: so it
        # has all the time that any request may take. It waits before those that came later.
        left_s = self.terms.request_timeout_s - caller.spent_s - (time.monotonic() - began)
        try:
            return await self._attempt(quote, 2, left_s, caller, reservation)
        except KilledForMemory as error:
            if not was_killed:
                raise
            # Once may have been a neighbour's fault. Twice in a row it is this request's, and it
            # would kill more replicas if it were tried again: a job in five attempts, two in each.
            raise OutOfMemory(
                "two replicas ran out of memory on this request: ask for a smaller width and"
                " height, or send fewer or smaller reference images"
            ) from error

    async def _attempt(
        self,
        quote: Quote,
        number: int,
        deadline_s: float,
        caller: Caller,
        reservation: Reservation,
    ) -> ImageResult:
        request = quote.request
        affinity = affinity_of(request, self.prices)
        submission = submission_for(quote, number, deadline_s, caller, affinity)
        asked_at = time.monotonic()
        try:
            # Before it is submitted: its turn for a tier that is not deployed would never come.
            await self.handles.connect(request.tier)
            replica = await self.queue.take(submission, caller.on_event, reservation.quota)
        except (Overloaded, DeadlineTooShort, TierUnavailable) as error:
            self.metrics.refuse(request.tier, error.code)
            raise
        self.metrics.wait(request.tier, time.monotonic() - asked_at)
        is_done = False
        try:
            # Not before its turn: the pixels of all that wait may not fit into this process.
            request = await loaded(request)
            if number == 1:
                self.metrics.enter(request.tier, quote.gpu_seconds)
            reservation.begin()
            progress = partial(self.queue.progress, submission.ticket_id)
            on_event = followed(quote, caller.on_event, progress)
            run = () if caller.retry is None else (caller.retry.run,)
            result = await self.handles.generate(request, replica, on_event, *run)
            is_done = True
        finally:
            self.queue.end(submission.ticket_id, is_done=is_done)
        self.metrics.compare(self.prices.learn(request, result.times, result.layout))
        return result

    def _record(self, request: ImageRequest, caller: Caller) -> None:
        if self.records is not None:
            deadline_s = caller.deadline_s or self.terms.deadlines.get(request.tier)
            left_s = None if deadline_s is None else deadline_s - caller.spent_s
            self.records.record(request, time.time(), left_s, caller.key)
