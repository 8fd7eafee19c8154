"""The named Ray actor that keeps the ledger.

`LedgerActor` gives the ledger the time, tells it which replicas Serve names, and keeps decisions
until their gateway has heard them. Where nobody knows what an error left behind, the process ends:
Ray starts the actor anew, and the gateways' reports fill it again.
"""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from flux_ray.meter import SHOW_S, gauge
from flux_ray.metrics import QUEUED_REQUESTS, QUEUED_SECONDS
from flux_ray.router import handover
from flux_ray.router.background import keep_running
from flux_ray.router.ledger.ledger import Ledger
from flux_ray.router.ledger.messages import (
    Backlog,
    Decision,
    GatewayReport,
    Outbox,
    Place,
    QuotaRequest,
    Receipt,
    ReportReply,
    SubmitRequest,
    UsageReport,
)
from flux_ray.router.pricing import Snapshot, merged
from flux_ray.router.queue import Forecast, TierQueue
from flux_ray.router.quotas import (
    LimitExceeded,
    LimitStatus,
    QuotaLedger,
    UsageEntry,
    UsageRow,
    UsageSync,
)

logger = logging.getLogger("ray.serve")

# With nobody calling for so long, the actor ends: its gateways are gone, or were upgraded.
IDLE_S = 60.0
# `listen` returns after so long even without decisions.
LISTEN_S = 5.0
# Silent gateways, new tiers and due decisions are looked for at least this often.
TICK_S = 0.5
# A new ledger decides nothing before every gateway has reported what it has: each reports twice a
# second. Otherwise it would assign replicas that are busy.
REJOIN_S = 0.6
# On a busy machine it takes this long until a replica has its next request. The queue assigns it
# that much before the last one ends, or the replica would be idle meanwhile.
LEAD_S = 0.05

P = ParamSpec("P")
T = TypeVar("T")


class DecisionOutbox:
    """The outbox of one gateway, whose `listen` waits here for decisions."""

    def __init__(self) -> None:
        self._outbox: Outbox[Decision] = Outbox(uuid.uuid4().hex)
        self._filled = asyncio.Event()

    def put(self, decisions: list[Decision]) -> None:
        """Add decisions, and wake whoever listens."""
        self.keep(decisions)
        self._filled.set()

    def keep(self, decisions: list[Decision]) -> None:
        """Add decisions and wake nobody: a reply tells them, and this is in case it is lost."""
        self._outbox.put(decisions)

    async def after(self, receipt: Receipt) -> tuple[Receipt, list[Decision]]:
        """Return the decisions after a receipt, with theirs; wait up to `LISTEN_S` for some."""
        heard, decisions = self._outbox.after(receipt)
        if not decisions:
            self._filled.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._filled.wait(), LISTEN_S)
            heard, decisions = self._outbox.after(receipt)
        return heard, decisions


class QueueGauges:
    """The lengths of all queues, shown by the ledger's process, of which there is one."""

    def __init__(self) -> None:
        self._requests, self._seconds = gauge(QUEUED_REQUESTS), gauge(QUEUED_SECONDS)
        self._shown_at = -SHOW_S

    def show(self, ledger: Ledger, now: float) -> None:
        """Set the gauges if it is time to; call it as often as you like."""
        if now - self._shown_at < SHOW_S:
            return
        self._shown_at = now
        for tier, (num_waiting, waiting_s) in ledger.lengths(now).items():
            self._requests.set(num_waiting, {"tier": tier})
            self._seconds.set(waiting_s, {"tier": tier})


def end_process() -> None:
    """End this process at once; Ray starts the actor in a new one."""
    logging.shutdown()
    os._exit(1)


def ends_on_error(
    method: Callable[P, Awaitable[T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make an unforeseen error in `method` end the ledger, whose books may be half written."""

    @wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        ledger: Any = args[0]
        ledger.begin()
        try:
            return await method(*args, **kwargs)
        except Exception:
            logger.exception("the ledger ends, and is built anew: %s failed", method.__name__)
            ledger.end()
            raise

    return call


async def connect(tier: str) -> Any:
    """Connect to a tier as a gateway does: Serve tells this process of its replicas then."""
    from ray import serve

    handle = await asyncio.to_thread(serve.get_app_handle, tier)
    return handle.options(method_name="generate")


class LedgerActor:
    """The Ray actor around the cluster's one `Ledger`; a `LedgerService`.

    All gateways and scaling policies call it, through `RemoteLedger`; its methods run on its one
    event loop. What it loses by dying, the gateways report again.
    """

    def __init__(
        self,
        connect: Callable[[str], Awaitable[Any]] = connect,
        end: Callable[[], None] = end_process,
        rejoin_s: float = REJOIN_S,
        companion: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Keep `companion` running in this process, of which the cluster has just one."""
        self.end = end
        self.spoken_at = time.monotonic()
        self._connect = connect
        self._decides_from = time.monotonic() + rejoin_s
        self._allowances = QuotaLedger()
        self._ledger = Ledger(partial(TierQueue, lead_s=LEAD_S), self._allowances)
        self._gauges = QueueGauges()
        self._mailboxes: dict[str, DecisionOutbox] = {}
        self._prices: Snapshot = ()
        self._spoken = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self._companion = companion
        self._accompanying: asyncio.Task[None] | None = None
        # By tier, the task that holds its handle.
        self._watching: dict[str, asyncio.Task[None]] = {}

    def begin(self) -> None:
        """Note that somebody calls, and start the companion if it is the first call."""
        self.spoken_at = time.monotonic()
        if self._companion is not None and self._accompanying is None:
            self._accompanying = keep_running(self._companion, "what goes on beside the ledger")

    @ends_on_error
    async def say(self, gateway: str, report: GatewayReport) -> ReportReply:
        """Write down a gateway's report; return what is decided at once."""
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick())
        now = time.monotonic()
        unknown = self._ledger.hear(gateway, report, now)
        admitted = self._ledger.admitted(now)
        decisions = self._decide(now)
        told = decisions.pop(gateway, [])
        # If the reply is lost, a refusal by a limit is not told again: the gateway sends the
        # request once more, and by then it may have been let in.
        self._mailbox(gateway).keep([each for each in told if each.limit is None])
        self._deliver(decisions)
        self._spoken.set()
        positions = self._ledger.positions(gateway, report.watched, now)
        return ReportReply(unknown, tuple(told), positions, admitted)

    @ends_on_error
    async def listen(self, gateway: str, receipt: Receipt) -> tuple[Receipt, list[Decision]]:
        """Wait up to `LISTEN_S` for decisions after `receipt`; return them with their receipt."""
        return await self._mailbox(gateway).after(receipt)

    @ends_on_error
    async def forecast(self, submissions: tuple[SubmitRequest, ...]) -> tuple[Forecast, ...]:
        """Predict what would become of each request if it alone were submitted now."""
        now = time.monotonic()
        return tuple(self._ledger.forecast(submission, now) for submission in submissions)

    @ends_on_error
    async def places(self, name: str) -> tuple[Place, ...]:
        """Return the replicas that run, or ran, the request of this name, the latest first."""
        return self._ledger.places(name, time.monotonic())

    @ends_on_error
    async def backlog(self, tier: str, cold_start_s: float | None = None) -> Backlog:
        """Return a tier's work for its scaling policy, which knows how long a replica starts."""
        if cold_start_s is not None:
            self._ledger.learn_cold_start(tier, cold_start_s)
        return self._ledger.backlog(tier, time.monotonic())

    @ends_on_error
    async def share_prices(self, snapshot: Snapshot) -> Snapshot:
        """Merge what a gateway learned of prices; return what all gateways did."""
        self._prices = merged(self._prices, snapshot)
        return self._prices

    @ends_on_error
    async def enter(self, gateway: str, quota: QuotaRequest) -> LimitExceeded | LimitStatus | None:
        """Count a request against its key's limits; return why not, or what its key has left."""
        entry, limits, rows = quota.entry, quota.limits, quota.rows
        return self._allowances.admit(gateway, entry, limits, rows, time.monotonic())

    @ends_on_error
    async def leave(self, gateway: str, entry: UsageEntry, rows: tuple[UsageRow, ...]) -> None:
        """Note that a counted request has ended; `rows` include what it used."""
        self._allowances.leave(gateway, entry.request_id, entry.tier, rows)

    @ends_on_error
    async def share_usage(self, gateway: str, report: UsageReport) -> UsageSync:
        """Merge a gateway's counted requests and what keys used; return what is new to it."""
        entries, rows, now = report.entries, report.rows, time.monotonic()
        return self._allowances.share(gateway, entries, rows, now, tells_all=report.tells_all)

    async def _tick(self) -> None:
        try:
            while True:
                wait_s = min(TICK_S, max(0.001, self._ledger.wake_at() - time.monotonic()))
                self._spoken.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._spoken.wait(), wait_s)
                self._look_around(time.monotonic())
        except Exception:
            logger.exception("the ledger ends, and is built anew: its ticks failed")
            self.end()

    def _look_around(self, now: float) -> None:
        """Do what no call asks for: end when idle, forget dead gateways, watch new tiers."""
        if now - self.spoken_at > IDLE_S:
            logger.info("nobody speaks to this ledger any more")
            ray.kill(ray.get_runtime_context().current_actor)
        # Not only when nobody calls: of a few gateways one always does, and what a dead one holds
        # would never be free.
        for gateway in self._ledger.forget_silent(now):
            self._mailboxes.pop(gateway, None)
        for tier in self._ledger.tiers - self._watching.keys():
            self._watching[tier] = keep_running(partial(self._watch, tier), f"watching {tier}")
        self._deliver(self._decide(now))
        self._gauges.show(self._ledger, now)

    async def _watch(self, tier: str) -> None:
        """Hold a handle of the tier: as long as there is one, Serve tells of its replicas."""
        try:
            handle = await self._connect(tier)
        except (RayError, RayServeException) as error:
            logger.info("%s cannot be watched yet: %s", tier, error)
            await asyncio.sleep(TICK_S)
            return
        await asyncio.Event().wait()
        del handle

    def _decide(self, now: float) -> dict[str, list[Decision]]:
        for tier, names in handover.REACHABLE.items():
            self._ledger.see_replicas(tier, names, now)
        return self._ledger.decide(now) if now >= self._decides_from else {}

    def _deliver(self, decisions: dict[str, list[Decision]]) -> None:
        for gateway, each in decisions.items():
            self._mailbox(gateway).put(each)

    def _mailbox(self, gateway: str) -> DecisionOutbox:
        return self._mailboxes.setdefault(gateway, DecisionOutbox())
