"""A gateway's side of key limits: it counts requests and what they used, and tells the ledger.

`QuotaClient` holds all requests of the gateway; `PendingQuota` and `Reservation` are of one.
`PriceExchange` shares what gateways learn of prices through the ledger, which outlives them.
"""

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from flux_ray.errors import FluxError, Overloaded, QuotaSpent, QuotaTooSmall, RateLimited
from flux_ray.router.background import AGAIN_S, keep_running, within
from flux_ray.router.ledger.messages import QuotaRequest, UsageReport
from flux_ray.router.ledger.service import LEDGER_BACK_S, LedgerLost, LedgerService
from flux_ray.router.pricing import CostModel
from flux_ray.router.quotas import (
    UNLIMITED,
    LimitExceeded,
    LimitStatus,
    Name,
    QuotaLimits,
    Usage,
    UsageEntry,
    UsageRow,
    Use,
)

logger = logging.getLogger("ray.serve")

PRICES_PERIOD_S = 5.0


class PriceExchange:
    """Share what this gateway learns of prices through the ledger, in a task of its own."""

    def __init__(self, exchange: LedgerService, prices: CostModel) -> None:
        self._exchange = exchange
        self._prices = prices
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the task that shares prices every few seconds."""
        self._task = keep_running(self._run, "the exchange of prices")

    async def _run(self) -> None:
        while True:
            await self.share()
            await asyncio.sleep(PRICES_PERIOD_S)

    async def share(self) -> None:
        """Share prices once; a ledger that is away gets them the next time."""
        try:
            known = await self._exchange.share_prices(self._prices.snapshot())
        except LedgerLost as error:
            logger.warning("prices are not shared: %s", error)
            return
        self._prices.restore(known)


USAGE_PERIOD_S = 2.0
# An answer is held back for up to this long until the ledger knows that its request is over.
# Otherwise a client that asks again at once could still be at its limit of concurrent ones.
LEAVE_S = 1.0
# `used_today` waits this long for what other gateways know, if nothing was heard of them yet.
LEARN_S = 1.0


def count_nowhere(tier: str, limit: str) -> None:
    """Count no refusal: the default of a client without metrics."""


class PendingQuota:
    """What one request counts against its key's limits, as it is asked of the ledger.

    `LedgerClient` sends it with the request's entry of the queue, and tells it the answer.
    """

    def __init__(self, client: "QuotaClient", entry: UsageEntry, limits: QuotaLimits) -> None:
        self.entry = entry
        self._client = client
        self._limits = limits
        self._is_admitted = False

    def request(self) -> QuotaRequest:
        """Return the message to the ledger, with what is known by now of the key's day."""
        rows = self._client.hold(self.entry)
        return QuotaRequest(self.entry, self._limits, rows, self._is_admitted)

    def admit(self, status: LimitStatus | None) -> None:
        """Note that the ledger has let it in, and what is left to the key."""
        self._is_admitted = True
        self._client.note(self.entry.key, status)

    def refuse(self, denial: LimitExceeded) -> FluxError:
        """Count the refusal; return the error for the caller."""
        self._client.count(self.entry.tier, denial.name)
        return error_for(denial)


class Reservation:
    """Keep what one request has used, from its entry to its end; `Router` calls it.

    `quota`: what is to be asked of the ledger when it is submitted; None if its key has no limits.
    """

    def __init__(self, price: Use, cost_s: float, quota: PendingQuota | None = None) -> None:
        self.quota = quota
        self._price = price
        self._cost_s = cost_s
        self._began_at = math.inf
        self.use = Use()

    def begin(self) -> None:
        """Note that a replica begins to work on the request."""
        self._began_at = time.monotonic()

    def pause(self) -> None:
        """Note that its replica was lost: until another begins, nobody works on it."""
        self._began_at = math.inf

    def finish(self, gpu_seconds: float) -> None:
        """Charge what the request took, in GPU seconds."""
        self.use = Use(gpu_seconds, self._price.megapixels)

    def break_off(self) -> None:
        """Charge the part of the price used before cancellation or timeout."""
        taken_s = time.monotonic() - self._began_at
        share = min(1.0, max(0.0, taken_s) / self._cost_s)
        self.use = Use(self._price.gpu_seconds * share, self._price.megapixels * share)


class QuotaClient:
    """Hold the requests of this gateway whose keys have limits, and share what keys used.

    A task of its own reports to the ledger every 2 s and learns what keys used through other
    gateways, so that any gateway can tell a new ledger. `count` is called with tier and limit of
    every refusal.
    """

    def __init__(
        self, ledger: LedgerService, gateway: str, count: Callable[[str, str], None] = count_nowhere
    ) -> None:
        self._ledger = ledger
        self._gateway = gateway
        self.count = count
        # What is left to each key, and when the ledger said so.
        self._standings: dict[str, tuple[LimitStatus, float]] = {}
        self._has_heard = asyncio.Event()
        self._entries: dict[tuple[str, str], UsageEntry] = {}
        self._usage = Usage()
        self._news: set[Name] = set()
        self._tells_all = True
        self._task: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def reserved(self, entry: UsageEntry, limits: QuotaLimits) -> AsyncIterator[Reservation]:
        """Charge the key for the request inside, from when its `quota` is first sent.

        Whoever submits the request to the queue sends it in the same message.
        """
        if limits == UNLIMITED:
            yield Reservation(entry.use, entry.cost_s)
            return
        self._start()
        reservation = Reservation(entry.use, entry.cost_s, PendingQuota(self, entry, limits))
        try:
            yield reservation
        except asyncio.CancelledError:
            reservation.break_off()
            raise
        finally:
            if self._entries.pop((entry.request_id, entry.tier), None) is not None:
                if reservation.use != Use():
                    self._news.add(
                        self._usage.add(self._gateway, entry.key, reservation.use, time.time())
                    )
                await self._leave(entry)

    @asynccontextmanager
    async def entered(
        self, entry: UsageEntry, limits: QuotaLimits, within_s: float | None = None
    ) -> AsyncIterator[Reservation]:
        """Count a request that is submitted later, and hold it while the block runs.

        Raise RateLimited or QuotaTooSmall if it is over a limit, and Overloaded if the ledger says
        nothing within `within_s` seconds.
        """
        reason = "its deadline came before its key's limits were known"
        async with self.reserved(entry, limits) as reservation:
            if reservation.quota is not None:
                async with within(within_s, Overloaded(reason, None, LEDGER_BACK_S)):
                    await self._enter(reservation.quota)
            yield reservation

    def hold(self, entry: UsageEntry) -> tuple[UsageRow, ...]:
        """Hold the request from now on; return what is known of its key's day.

        Call it before the ledger hears of the request: the ledger strikes out any request that a
        report of its gateway does not name.
        """
        self._entries[entry.request_id, entry.tier] = entry
        return self._usage.rows_of(entry.key)

    def note(self, key: str, status: LimitStatus | None) -> None:
        """Note what is left to a key; None if no limit says so, and what was known is forgotten."""
        if status is None:
            self._standings.pop(key, None)
        else:
            self._standings[key] = (status, time.monotonic())

    def standing(self, key: str) -> LimitStatus | None:
        """Return what is left to the key, as the ledger last said here; None if it said nothing."""
        if key not in self._standings:
            return None
        standing, at = self._standings[key]
        return standing._replace(reset_s=max(0.0, standing.reset_s - (time.monotonic() - at)))

    async def used_today(self, key: str) -> Use:
        """Return what the key used today through all gateways, as of about 2 s ago.

        Requests that this gateway holds are included with their price.
        """
        self._start()
        try:
            await asyncio.wait_for(self._has_heard.wait(), LEARN_S)
        except TimeoutError:
            logger.warning("what %s used through other gateways is not known", key)
        used = self._usage.of(key, time.time())
        for entry in self._entries.values():
            if entry.key == key:
                used += entry.use
        return used

    def stop(self) -> None:
        """Cancel the task that reports to the ledger."""
        if self._task is not None:
            self._task.cancel()

    async def share(self) -> None:
        """Report once to the ledger, and learn from its answer. Raise LedgerLost without one.

        The report has what is new, or all if either side may have lost what it knew.
        """
        entries, tells_all = tuple(self._entries.values()), self._tells_all
        rows = self._usage.rows() if tells_all else self._usage.rows_named(self._news)
        self._news, self._tells_all = set(), True
        report = UsageReport(entries, rows, tells_all)
        shared = await self._ledger.share_usage(self._gateway, report)
        self._usage.merge(shared.rows)
        self._usage.forget(time.time())
        self._has_heard.set()
        self._tells_all = shared.tell_all

    async def _enter(self, quota: PendingQuota) -> None:
        while True:
            try:
                answer = await self._ledger.enter(self._gateway, quota.request())
                break
            except LedgerLost as error:
                # It waits for the ledger as it would for its turn: uncounted it is not accepted.
                request_id = quota.entry.request_id
                logger.warning("request %s is not counted yet: %s", request_id, error)
                await asyncio.sleep(AGAIN_S)
        if isinstance(answer, LimitExceeded):
            raise quota.refuse(answer)
        quota.admit(answer)

    async def _leave(self, entry: UsageEntry) -> None:
        """Tell the ledger that a request has ended, and wait up to `LEAVE_S` for its answer."""
        # In an empty context: otherwise Ray would cancel the call together with the request.
        rows = self._usage.rows_of(entry.key)
        task = asyncio.get_running_loop().create_task(
            self._tell_of_leaving(entry, rows), context=contextvars.Context()
        )
        # The event loop itself holds tasks only weakly: this one could vanish half-way.
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await asyncio.wait((task,), timeout=LEAVE_S)

    async def _tell_of_leaving(self, entry: UsageEntry, rows: tuple[UsageRow, ...]) -> None:
        try:
            await self._ledger.leave(self._gateway, entry, rows)
        except LedgerLost as error:
            logger.warning("request %s ends later in the ledger: %s", entry.request_id, error)

    def _start(self) -> None:
        if self._task is None:
            self._task = keep_running(self._share, "what shares the use of keys")

    async def _share(self) -> None:
        while True:
            try:
                await self.share()
                if self._tells_all:
                    await self.share()
            except LedgerLost as error:
                logger.warning("what keys use is not shared: %s", error)
                await asyncio.sleep(AGAIN_S)
                continue
            await asyncio.sleep(USAGE_PERIOD_S)


def error_for(denial: LimitExceeded) -> FluxError:
    """Return the error for a limit: retry after whole seconds, or that waiting does not help."""
    if math.isinf(denial.retry_after_s):
        return QuotaTooSmall(denial.reason)
    error = QuotaSpent if denial.is_daily else RateLimited
    retry_after_s = max(1, math.ceil(denial.retry_after_s))
    return error(denial.reason, None, retry_after_s, denial.limit, denial.left)
