"""The ledger's Ray hands: the named actor that keeps it, and the gateways' line to it."""

import asyncio
import contextlib
import time
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from flux_ray.router.allowances import (
    Allowance,
    Allowances,
    Denial,
    Entry,
    Shared,
    Standing,
)
from flux_ray.router.calibration import Snapshot, merged
from flux_ray.router.forecast import Forecast
from flux_ray.router.ledger import Backlog, Decision, Heard, Ledger, Offer, Statement
from flux_ray.router.queue import TierQueue
from flux_ray.router.turns import LedgerLost
from flux_ray.router.usage import Row

NAME = "flux-ray-ledger"
NAMESPACE = "flux-ray"
LISTEN_S = 5.0
TICK_S = 0.5
ANSWER_S = 5.0
# From the end of one request until the next is at the replica, on a busy machine: it would be idle.
LEAD_S = 0.05


class Mailbox:
    """Decisions for one gateway, kept until it says that it has heard them."""

    def __init__(self) -> None:
        self._first = 1
        self._decisions: list[Decision] = []
        self._filled = asyncio.Event()

    def put(self, decisions: list[Decision]) -> None:
        """Add them, and wake whoever listens."""
        self.keep(decisions)
        self._filled.set()

    def keep(self, decisions: list[Decision]) -> None:
        """Add them for the next time: they were told, but perhaps not heard."""
        self._decisions += decisions

    async def after(self, heard: int) -> tuple[int, list[Decision]]:
        """The last decision's number, and those after number `heard`; waits if there is none."""
        del self._decisions[: max(0, heard + 1 - self._first)]
        self._first = max(self._first, heard + 1)
        if not self._decisions:
            self._filled.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._filled.wait(), LISTEN_S)
        return self._first + len(self._decisions) - 1, list(self._decisions)


class LedgerActor:
    """One for the cluster. What it loses by dying, the gateways tell it again."""

    def __init__(self) -> None:
        self._ledger = Ledger(partial(TierQueue, lead_s=LEAD_S))
        self._allowances = Allowances()
        self._mailboxes: dict[str, Mailbox] = {}
        self._prices: Snapshot = ()
        self._spoken = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None

    async def say(self, gateway: str, statement: Statement) -> Heard:
        """Write down a gateway's statement; what to tell it at once."""
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick())
        unknown = self._ledger.hear(gateway, statement, time.monotonic())
        decisions = self._ledger.decide(time.monotonic())
        told = decisions.pop(gateway, [])
        self._mailbox(gateway).keep(told)
        self._deliver(decisions)
        self._spoken.set()
        is_alone = self._ledger.is_alone(gateway, time.monotonic())
        return Heard(unknown, tuple(told), is_alone)

    async def listen(self, gateway: str, heard: int) -> tuple[int, list[Decision]]:
        """A gateway waits here for what is decided about its tickets."""
        return await self._mailbox(gateway).after(heard)

    async def forecast(self, offers: tuple[Offer, ...]) -> tuple[Forecast, ...]:
        """What would become of each of them alone, for who has to choose among tiers."""
        now = time.monotonic()
        return tuple(self._ledger.forecast(offer, now) for offer in offers)

    async def backlog(self, tier: str) -> Backlog:
        """For the policies that scale a tier."""
        return self._ledger.backlog(tier, time.monotonic())

    async def share_prices(self, snapshot: Snapshot) -> Snapshot:
        """Merge what a gateway learned; what all of them did."""
        self._prices = merged(self._prices, snapshot)
        return self._prices

    async def enter(
        self, gateway: str, entry: Entry, allowance: Allowance, rows: tuple[Row, ...]
    ) -> Denial | Standing | None:
        """Count a request against what its key may have; why not, or what is left to it."""
        return self._allowances.admit(gateway, entry, allowance, rows, time.time())

    async def leave(self, gateway: str, request_id: str, tier: str, rows: tuple[Row, ...]) -> None:
        """A request that was counted has ended."""
        self._allowances.leave(gateway, request_id, tier, rows)

    async def share_usage(
        self, gateway: str, entries: tuple[Entry, ...], rows: tuple[Row, ...], tells_all: bool
    ) -> Shared:
        """What a gateway has in hand and knows of today; what it does not know yet."""
        return self._allowances.share(gateway, entries, rows, time.time(), tells_all=tells_all)

    async def _tick(self) -> None:
        while True:
            wait_s = min(TICK_S, max(0.001, self._ledger.wake_at() - time.monotonic()))
            self._spoken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._spoken.wait(), wait_s)
            # Also while others speak: of a few gateways one always does, and what a dead one holds
            # would never be free.
            for gateway in self._ledger.forget_silent(time.monotonic()):
                self._mailboxes.pop(gateway, None)
            self._deliver(self._ledger.decide(time.monotonic()))

    def _deliver(self, decisions: dict[str, list[Decision]]) -> None:
        for gateway, each in decisions.items():
            self._mailbox(gateway).put(each)

    def _mailbox(self, gateway: str) -> Mailbox:
        return self._mailboxes.setdefault(gateway, Mailbox())


class RemoteLedger:
    """The line to the ledger, which is started by whoever needs it first."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def say(self, gateway: str, statement: Statement) -> Heard:
        """Make a statement."""
        heard: Heard = await self._call(ANSWER_S, "say", gateway, statement)
        return heard

    async def listen(self, gateway: str, heard: int) -> tuple[int, list[Decision]]:
        """Wait for decisions."""
        news: tuple[int, list[Decision]] = await self._call(
            LISTEN_S + ANSWER_S, "listen", gateway, heard
        )
        return news

    async def forecast(self, offers: tuple[Offer, ...]) -> tuple[Forecast, ...]:
        """What would become of each of them alone."""
        forecasts: tuple[Forecast, ...] = await self._call(ANSWER_S, "forecast", offers)
        return forecasts

    async def backlog(self, tier: str) -> Backlog:
        """What waits, runs and arrived; LedgerLost if there is nobody to ask."""
        backlog: Backlog = await self._call(ANSWER_S, "backlog", tier)
        return backlog

    async def share_prices(self, snapshot: Snapshot) -> Snapshot:
        """Tell it what was learned here; what all gateways did."""
        known: Snapshot = await self._call(ANSWER_S, "share_prices", snapshot)
        return known

    async def enter(
        self, gateway: str, entry: Entry, allowance: Allowance, rows: tuple[Row, ...]
    ) -> Denial | Standing | None:
        """Count a request; why not, or what is left to its key."""
        answer: Denial | Standing | None = await self._call(
            ANSWER_S, "enter", gateway, entry, allowance, rows
        )
        return answer

    async def leave(self, gateway: str, request_id: str, tier: str, rows: tuple[Row, ...]) -> None:
        """It has ended."""
        await self._call(ANSWER_S, "leave", gateway, request_id, tier, rows)

    async def share_usage(
        self, gateway: str, entries: tuple[Entry, ...], rows: tuple[Row, ...], tells_all: bool
    ) -> Shared:
        """What is in hand and known here; what is known elsewhere."""
        shared: Shared = await self._call(
            ANSWER_S, "share_usage", gateway, entries, rows, tells_all
        )
        return shared

    async def _call(self, timeout_s: float, method: str, *args: object) -> Any:
        try:
            if self._actor is None:
                # Both block until Ray's head answers.
                self._actor = await asyncio.to_thread(start_ledger)
            return await asyncio.wait_for(getattr(self._actor, method).remote(*args), timeout_s)
        except (RayActorError, RayTaskError, TimeoutError, ValueError) as error:
            self._actor = None
            raise LedgerLost(f"{method}: {error}") from error


def start_ledger() -> Any:
    """The ledger's handle, after starting it where it is not there. Blocks."""
    remote: Any = ray.remote
    actor = remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(LedgerActor)
    return actor.options(
        name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote()
