"""The ledger's Ray hands: the named actor that keeps it, and the gateways' line to it."""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flux_ray.request import PROTOCOL

# The module, not what is in it: its items are replaced.
from flux_ray.router import handover
from flux_ray.router.allowances import (
    Allowance,
    Allowances,
    Denial,
    Entry,
    Shared,
    Standing,
)
from flux_ray.router.background import keep_running
from flux_ray.router.calibration import Snapshot, merged
from flux_ray.router.forecast import Forecast
from flux_ray.router.hung_replicas import watch_replicas
from flux_ray.router.ledger import Ledger
from flux_ray.router.messages import Backlog, Decision, Heard, Offer, Statement
from flux_ray.router.outbox import Outbox, Receipt
from flux_ray.router.queue import TierQueue
from flux_ray.router.retries import Place
from flux_ray.router.turns import LEDGER_BACK_S, LedgerLost
from flux_ray.router.usage import Row

logger = logging.getLogger("ray.serve")

# Code that speaks another protocol has a ledger of its own: while a cluster is upgraded both live,
# and the old one ends when nobody has spoken to it for a while.
NAME = f"flux-ray-ledger-{PROTOCOL}"
NAMESPACE = "flux-ray"
IDLE_S = 60.0
LISTEN_S = 5.0
TICK_S = 0.5
# A new ledger hears first what all gateways have: each speaks twice a second.
REJOIN_S = 0.6
ANSWER_S = 5.0
# A request waits for it before it begins to wait, and can do without.
FORECAST_S = 1.0
# A gateway that has heard nothing for so long is cut off: a ledger that died or hangs would have
# been replaced.
LOST_S = LEDGER_BACK_S
# A ledger that leaves so many calls in a row unanswered hangs.
MAX_UNANSWERED = 2
# A time that is over so much too late was this process's own: it stood still, and read no answers.
LAG_S = 1.0
# From the end of one request until the next is at the replica, on a busy machine: it would be idle.
LEAD_S = 0.05

P = ParamSpec("P")
T = TypeVar("T")


class Mailbox:
    """A gateway's outbox, at which it waits."""

    def __init__(self) -> None:
        self._outbox: Outbox[Decision] = Outbox(uuid.uuid4().hex)
        self._filled = asyncio.Event()

    def put(self, decisions: list[Decision]) -> None:
        """Add them, and wake whoever listens."""
        self.keep(decisions)
        self._filled.set()

    def keep(self, decisions: list[Decision]) -> None:
        """Add them for the next time: they were told, but perhaps not heard."""
        self._outbox.put(decisions)

    async def after(self, receipt: Receipt) -> tuple[Receipt, list[Decision]]:
        """The decisions after a receipt, and the receipt for them; waits if there is none."""
        heard, decisions = self._outbox.after(receipt)
        if not decisions:
            self._filled.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._filled.wait(), LISTEN_S)
            heard, decisions = self._outbox.after(receipt)
        return heard, decisions


def end_process() -> None:
    """Ray starts the actor anew."""
    logging.shutdown()
    os._exit(1)


def ends_on_error(
    method: Callable[P, Awaitable[T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """An unforeseen error ends the ledger: what it wrote may be half of it. It is built anew."""

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
    """One for the cluster. What it loses by dying, the gateways tell it again."""

    def __init__(
        self,
        connect: Callable[[str], Awaitable[Any]] = connect,
        end: Callable[[], None] = end_process,
        rejoin_s: float = REJOIN_S,
        companion: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`companion`: what else goes on in this process, of which the cluster has just one."""
        self.end = end
        self.spoken_at = time.monotonic()
        self._connect = connect
        self._decides_from = time.monotonic() + rejoin_s
        self._ledger = Ledger(partial(TierQueue, lead_s=LEAD_S))
        self._allowances = Allowances()
        self._mailboxes: dict[str, Mailbox] = {}
        self._prices: Snapshot = ()
        self._spoken = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self._companion = companion
        self._accompanying: asyncio.Task[None] | None = None
        # By tier, what keeps them, and what holds its handle.
        self._watching: dict[str, asyncio.Task[None]] = {}

    def begin(self) -> None:
        """Somebody speaks to it."""
        self.spoken_at = time.monotonic()
        if self._companion is not None and self._accompanying is None:
            self._accompanying = keep_running(self._companion, "what goes on beside the ledger")

    @ends_on_error
    async def say(self, gateway: str, statement: Statement) -> Heard:
        """Write down a gateway's statement; what to tell it at once."""
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick())
        now = time.monotonic()
        unknown = self._ledger.hear(gateway, statement, now)
        decisions = self._decide(now)
        told = decisions.pop(gateway, [])
        self._mailbox(gateway).keep(told)
        self._deliver(decisions)
        self._spoken.set()
        positions = self._ledger.positions(gateway, statement.watched, now)
        return Heard(unknown, tuple(told), positions)

    @ends_on_error
    async def listen(self, gateway: str, receipt: Receipt) -> tuple[Receipt, list[Decision]]:
        """A gateway waits here for what is decided about its tickets."""
        return await self._mailbox(gateway).after(receipt)

    @ends_on_error
    async def forecast(self, offers: tuple[Offer, ...]) -> tuple[Forecast, ...]:
        """What would become of each of them alone, for who has to choose among tiers."""
        now = time.monotonic()
        return tuple(self._ledger.forecast(offer, now) for offer in offers)

    @ends_on_error
    async def places(self, name: str) -> tuple[Place, ...]:
        """Where a request that comes again may be, for who need not have it drawn anew then."""
        return self._ledger.places(name, time.monotonic())

    @ends_on_error
    async def backlog(self, tier: str, cold_start_s: float | None = None) -> Backlog:
        """For the policies that scale a tier, which know what a replica of it takes to start."""
        if cold_start_s is not None:
            self._ledger.learn_cold_start(tier, cold_start_s)
        return self._ledger.backlog(tier, time.monotonic())

    @ends_on_error
    async def share_prices(self, snapshot: Snapshot) -> Snapshot:
        """Merge what a gateway learned; what all of them did."""
        self._prices = merged(self._prices, snapshot)
        return self._prices

    @ends_on_error
    async def enter(
        self, gateway: str, entry: Entry, allowance: Allowance, rows: tuple[Row, ...]
    ) -> Denial | Standing | None:
        """Count a request against what its key may have; why not, or what is left to it."""
        return self._allowances.admit(gateway, entry, allowance, rows, time.monotonic())

    @ends_on_error
    async def leave(self, gateway: str, request_id: str, tier: str, rows: tuple[Row, ...]) -> None:
        """A request that was counted has ended."""
        self._allowances.leave(gateway, request_id, tier, rows)

    @ends_on_error
    async def share_usage(
        self, gateway: str, entries: tuple[Entry, ...], rows: tuple[Row, ...], tells_all: bool
    ) -> Shared:
        """What a gateway has in hand and knows of today; what it does not know yet."""
        return self._allowances.share(gateway, entries, rows, time.monotonic(), tells_all=tells_all)

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
        """See what nobody tells."""
        if now - self.spoken_at > IDLE_S:
            logger.info("nobody speaks to this ledger any more")
            ray.kill(ray.get_runtime_context().current_actor)
        # Also while others speak: of a few gateways one always does, and what a dead one holds
        # would never be free.
        for gateway in self._ledger.forget_silent(now):
            self._mailboxes.pop(gateway, None)
        for tier in self._ledger.tiers - self._watching.keys():
            self._watching[tier] = keep_running(partial(self._watch, tier), f"watching {tier}")
        self._deliver(self._decide(now))

    async def _watch(self, tier: str) -> None:
        """Hear of the tier's replicas from Serve, for as long as this process lives."""
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

    def _mailbox(self, gateway: str) -> Mailbox:
        return self._mailboxes.setdefault(gateway, Mailbox())


class RemoteLedger:
    """The line to the ledger, which is started by whoever needs it first.

    Who waits for one that hangs ends it, and Ray starts it anew.
    """

    def __init__(
        self,
        start: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start or start_ledger
        self._clock = clock
        # When the first call began of all that failed since one was answered.
        self._failing_since_s: float | None = None
        self._actor: Any = None
        self._starting: asyncio.Future[Any] | None = None
        self._num_unanswered = 0
        # Of its own, and one: it stands still while Ray's head is away.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")

    def is_heard(self) -> bool:
        """Say whether it answers, or may be about to: one that died comes back within seconds.

        It is asked twice a second as long as the gateway lives, and is heard again with its first
        answer.
        """
        since_s = self._failing_since_s
        return since_s is None or self._clock() - since_s < LOST_S

    async def say(self, gateway: str, statement: Statement) -> Heard:
        """Make a statement."""
        heard: Heard = await self._call(ANSWER_S, "say", gateway, statement)
        return heard

    async def listen(self, gateway: str, receipt: Receipt) -> tuple[Receipt, list[Decision]]:
        """Wait for decisions."""
        news: tuple[Receipt, list[Decision]] = await self._call(
            LISTEN_S + ANSWER_S, "listen", gateway, receipt
        )
        return news

    async def forecast(self, offers: tuple[Offer, ...]) -> tuple[Forecast, ...]:
        """What would become of each of them alone."""
        forecasts: tuple[Forecast, ...] = await self._call(FORECAST_S, "forecast", offers)
        return forecasts

    async def places(self, name: str) -> tuple[Place, ...]:
        """Where a request that comes again may be."""
        places: tuple[Place, ...] = await self._call(FORECAST_S, "places", name)
        return places

    async def backlog(self, tier: str, cold_start_s: float) -> Backlog:
        """What waits, runs and arrived; LedgerLost if there is nobody to ask."""
        backlog: Backlog = await self._call(ANSWER_S, "backlog", tier, cold_start_s)
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
        began_s = self._clock()
        try:
            answer = await self._answer(timeout_s, method, *args)
        except LedgerLost:
            if self._failing_since_s is None:
                self._failing_since_s = began_s
            raise
        self._failing_since_s = None
        return answer

    async def _answer(self, timeout_s: float, method: str, *args: object) -> Any:
        began_s = self._clock()
        try:
            async with asyncio.timeout(timeout_s):
                actor = await self._connected()
                answer = await getattr(actor, method).remote(*args)
        except TimeoutError as error:
            if self._clock() - began_s < timeout_s + LAG_S:
                self._note_silence()
            raise LedgerLost(f"{method}: no answer within {timeout_s:g} s") from error
        except (RayError, ValueError) as error:
            # It died, or ends; Ray gives whoever asks by name the one that lives.
            self._actor, self._num_unanswered = None, 0
            raise LedgerLost(f"{method}: {error}") from error
        self._num_unanswered = 0
        return answer

    async def _connected(self) -> Any:
        """The ledger's handle. Who waits for Ray's head wait for one call to it."""
        if self._actor is None:
            if self._starting is None or self._starting.done():
                loop = asyncio.get_running_loop()
                self._starting = loop.run_in_executor(self._thread, self._start)
            self._actor = await asyncio.shield(self._starting)
        return self._actor

    def _note_silence(self) -> None:
        """End a ledger that answers nobody: a stopped process never comes back by itself."""
        self._num_unanswered += 1
        if self._actor is not None and self._num_unanswered >= MAX_UNANSWERED:
            logger.error("the ledger hangs, and is started anew")
            self._num_unanswered = 0
            self._thread.submit(partial(ray.kill, self._actor, no_restart=False))


def start_ledger() -> Any:
    """The ledger's handle, after starting it where it is not there. Blocks.

    It asks for no processors: where tiers have taken them all, nothing would go on without it. So
    that it is not on a head that has none to give, it is put beside whoever has some.
    """
    remote: Any = ray.remote
    actor = remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(LedgerActor)
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    node = node_for_ledger(nodes, ray.get_runtime_context().get_node_id())
    return actor.options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        # Soft: it outlives the node.
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
    ).remote(companion=watch_replicas)


def node_for_ledger(nodes: Iterable[Mapping[str, Any]], own: str) -> str:
    """Return the id of a node that has processors: the caller's own if it has, else the first."""
    able = [
        str(node["NodeID"])
        for node in nodes
        if node["Alive"] and node.get("Resources", {}).get("CPU", 0) > 0
    ]
    return own if own in able or not able else min(able)
