"""Call replicas through Serve's handles of the tiers, and turn Ray's errors into ours.

`TierHandles` makes the calls. `Descriptions` asks each replica once, when it comes up, what it is:
a tier is redeployed on its own, with another layout or other code, and for a while replicas of both
kinds are up. `learn_layouts` tells prices what the replicas said.
"""

import asyncio
import contextvars
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from flux_ray.catalog import SPEEDS
from flux_ray.config import TierArgs
from flux_ray.errors import (
    FluxError,
    KilledForMemory,
    ProtocolMismatch,
    ReplicaFailed,
    TierUnavailable,
    not_deployed,
)
from flux_ray.request import PROTOCOL, EventStream, ImageRequest, ImageResult, OnEvent, last_of
from flux_ray.router.background import SharedCall, keep_running
from flux_ray.router.handover import GRANTED, REACHABLE
from flux_ray.router.pricing import CostModel, ReplicaSpec
from flux_ray.router.readiness import Readiness
from flux_ray.wire import (
    Description,
    Wire,
    answer_from,
    description_from,
    pack_call,
    pack_recall,
    pack_request,
)

logger = logging.getLogger("ray.serve")

# A replica that did not answer is asked again after a pause, which doubles up to the longest.
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0

Ask = Callable[[str, str], Awaitable[Description]]
# Called with a tier and what its replicas that are up said, in the order in which they started.
Learn = Callable[[str, tuple[Description, ...]], None]


def learn_nothing(tier: str, descriptions: tuple[Description, ...]) -> None:
    """Ignore what replicas say: the default of handles without prices."""


class Descriptions:
    """What the replicas say of themselves, as one gateway process knows it.

    `ask` asks a replica, and raises FluxError if it does not answer. `learn` is called whenever
    what is known of a tier has changed. Used from the gateway's event loop.
    """

    def __init__(self, ask: Ask, learn: Learn = learn_nothing) -> None:
        self._ask = ask
        self._learn = learn
        self._up: dict[str, tuple[str, ...]] = {}
        self._known: dict[str, dict[str, Description]] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    def see(self, tier: str, replicas: tuple[str, ...]) -> None:
        """Have a tier's new replicas asked in the background, and forget those that are gone.

        Call it as often as you like: it never waits, and does nothing while they stay the same.
        """
        if self._up.get(tier, ()) == replicas:
            return
        self._up[tier] = replicas
        known = self._known.setdefault(tier, {})
        gone = known.keys() - set(replicas)
        for replica in gone:
            del known[replica]
        if gone:
            self._tell(tier)
        for replica in replicas:
            if replica not in known and (tier, replica) not in self._asking:
                # In an empty context: otherwise Ray would cancel it together with the request that
                # happened to start it.
                self._asking[tier, replica] = asyncio.get_running_loop().create_task(
                    self._meet(tier, replica), context=contextvars.Context()
                )

    def of(self, tier: str) -> Mapping[str, Description]:
        """Return what the replicas of a tier said of themselves, by their names."""
        return self._known.get(tier, {})

    async def _meet(self, tier: str, replica: str) -> None:
        pause_s = FIRST_PAUSE_S
        try:
            while replica in self._up[tier]:
                try:
                    description = await self._ask(tier, replica)
                    # If this one is full, Serve calls another one.
                    if description.replica == replica:
                        self._note(tier, description)
                        return
                except FluxError as error:
                    logger.info("replica %s of %s cannot be asked yet: %s", replica, tier, error)
                except Exception:
                    # A bug of ours, or a newer version whose answer cannot be read. If it were
                    # given up, it would be priced wrong for as long as it lives.
                    logger.exception("replica %s of %s is asked again", replica, tier)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        finally:
            del self._asking[tier, replica]

    def _note(self, tier: str, description: Description) -> None:
        if description.replica in self._up[tier]:
            self._known[tier][description.replica] = description
            self._tell(tier)

    def _tell(self, tier: str) -> None:
        known = self._known[tier].values()
        self._learn(tier, tuple(sorted(known, key=lambda each: each.started_at_s)))


def learn_layouts(prices: CostModel, card: str, cold_starts: dict[str, float]) -> Learn:
    """Return a function that tells `prices` how the replicas of a tier are laid out.

    `card`: the GPU to go by if a replica's own is not in the catalogue. The function writes into
    `cold_starts` how many seconds a replica of each tier takes to start.
    """

    def learn(tier: str, descriptions: tuple[Description, ...]) -> None:
        for description in descriptions:
            try:
                args = TierArgs.model_validate(description.args, extra="ignore")
            except ValidationError as error:
                # A newer version has settings that are unknown here: the last known prices stay.
                logger.warning("the layout of %s is not known here: %s", tier, error)
                continue
            own = description.card if description.card in SPEEDS else None
            # The newest one comes last, and its layout is the one that the tier will have.
            prices.lay_out(tier, ReplicaSpec.of(args, own or card), description.layout)
            cold_starts[tier] = args.cold_start_s

    return learn


AGAIN_S = 1.0
# A tier's replicas come and go in minutes; a look at what Serve says of them costs nothing.
LOOK_S = 0.25
# A replica describes itself at once, or hangs.
ASK_S = 10.0
# So long a stream may take from its last value to its end.
END_S = 5.0


class TierHandles:
    """One Serve handle for each tier, whose application bears its name; a `Dispatcher`.

    Used from the gateway's event loop.
    """

    def __init__(self, tiers: tuple[str, ...], learn: Learn = learn_nothing) -> None:
        self._tiers = tiers
        self._descriptions = Descriptions(self._ask, learn)
        self._readiness = Readiness(tiers, reachable=partial(known_replicas, tiers))
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._connecting: dict[str, SharedCall[DeploymentHandle[Any]]] = {}
        # A thread for each tier, and none of the event loop's own: they block while Serve's
        # controller is away, and would take up the threads that others need.
        self._threads = ThreadPoolExecutor(max(1, len(tiers)), thread_name_prefix="handle")
        self._watching: dict[str, asyncio.Task[None]] = {}

    async def generate(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None = None, run: str = ""
    ) -> ImageResult:
        """Generate on the replica that the request was assigned.

        If its version cannot read the request, a replica of another version is called; raise
        ProtocolMismatch if there is none. The replica finds the request again as `run`.
        """
        call, refused = pack_request(request, run), set[int]()
        while True:
            try:
                with granted(call, replica), as_ours(request.tier):
                    return await self._attempt(call, on_event)
            except ProtocolMismatch as error:
                refused.add(error.protocol)
                other = self._other_than(refused, request.tier)
                if other is None:
                    raise
                logger.info("request %s goes to %s: %s", request.request_id, other, error)
                replica = other

    async def recall(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None, run: str
    ) -> ImageResult:
        """Return the images that the replica generated, or still generates, as `run`.

        Raise ReplicaFailed if it has none or is gone, TierUnavailable if it is too old to say.
        """
        tier = request.tier
        if replica not in self.reachable().get(tier, ()):
            raise ReplicaFailed(f"replica {replica} of {tier} is gone")
        call = pack_recall(tier, request.request_id, run)
        with granted(call, replica), as_ours(tier):
            return await self._attempt(call, on_event)

    async def connect(self, tier: str) -> None:
        """Make the tier's handle if there is none; TierUnavailable if it is not deployed."""
        # A tier that was removed still has its handle here, and calls would wait for ever.
        if not self.is_deployed(tier):
            raise not_deployed(tier)
        await self._handle_for(tier)

    def reachable(self) -> Mapping[str, tuple[str, ...]]:
        """Return the names of the replicas that this process can reach, by tier. Never waits.

        The first call starts watching the tiers.
        """
        for tier in set(self._tiers) - self._watching.keys():
            self._watching[tier] = keep_running(partial(self._watch, tier), f"watching {tier}")
        return known_replicas(self._tiers)

    def follow_status(self, lose: Callable[[str], None]) -> None:
        """Start reading which tiers serve; `lose` is called with each tier that is removed."""
        self._readiness.start(lose)

    async def ready_tiers(self) -> tuple[str, ...]:
        """Return the tiers that serve, or that a request would wake."""
        return await self._readiness.ready_tiers()

    def is_deployed(self, tier: str) -> bool:
        """Return whether Serve has an application of the tier; True until Serve has answered."""
        return self._readiness.is_deployed(tier)

    async def _attempt(self, call: Wire, on_event: OnEvent | None) -> ImageResult:
        handle = await self._handle_for(call["tier"])
        if on_event is None:
            response: Any = handle.remote(call)
        else:
            response = handle.options(method_name="follow", stream=True).remote(call)
        try:
            if on_event is None:
                return await result_of(response)
            return await last_of(events_of(response), on_event)
        except (asyncio.CancelledError, ProtocolMismatch):
            # Serve does this for a client that leaves, but not when our own deadline passes, or
            # when an event cannot be read: the replica would go on generating for nobody.
            response.cancel()
            raise

    async def _handle_for(self, tier: str) -> DeploymentHandle[Any]:
        if tier not in self._handles:
            try:
                handle = await self._connection_to(tier).result()
            except RayServeException as error:
                raise not_deployed(tier) from error
            # `options` makes the handle learn of its replicas now. Otherwise its first request
            # would, which waits for the ledger to assign one of these replicas.
            if tier not in self._handles:
                self._handles[tier] = handle.options(method_name="generate")
        return self._handles[tier]

    def _connection_to(self, tier: str) -> SharedCall[DeploymentHandle[Any]]:
        """Return the one call for a handle that all wait for: it blocks for the controller."""
        if tier not in self._connecting:
            self._connecting[tier] = SharedCall(self._threads, lambda: serve.get_app_handle(tier))
        return self._connecting[tier]

    def _other_than(self, protocols: set[int], tier: str) -> str | None:
        """Choose a replica of another protocol than these, best our own; None if there is none."""
        others = {
            replica: description.protocol
            for replica, description in self._descriptions.of(tier).items()
            if description.protocol not in protocols
        }
        ours = [replica for replica, protocol in others.items() if protocol == PROTOCOL]
        return random.choice(ours or list(others)) if others else None

    async def _watch(self, tier: str) -> None:
        """Connect to a tier as soon as it is deployed, and have its replicas described."""
        while True:
            try:
                with as_ours(tier):
                    await self._handle_for(tier)
                break
            except FluxError as error:
                logger.info("%s cannot be asked yet: %s", tier, error)
                await asyncio.sleep(AGAIN_S)
        while True:
            self._descriptions.see(tier, REACHABLE.get(tier, ()))
            await asyncio.sleep(LOOK_S)

    async def _ask(self, tier: str, replica: str) -> Description:
        call = pack_call(tier, f"describe {replica}")
        with granted(call, replica), as_ours(tier):
            handle = await self._handle_for(tier)
            response: Any = handle.options(method_name="describe").remote(call)
            try:
                return description_from(await asyncio.wait_for(response, ASK_S))
            except TimeoutError:
                response.cancel()
                raise ReplicaFailed(f"replica {replica} of {tier} does not answer") from None


def known_replicas(tiers: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the replicas that Serve has told this process of, by tier."""
    return {tier: REACHABLE[tier] for tier in tiers if tier in REACHABLE}


@contextmanager
def granted(call: Wire, replica: str) -> Iterator[None]:
    """Tell Serve's request router, while the block runs, which replica the call is for."""
    name = call["tier"], call["request_id"]
    GRANTED[name] = replica
    try:
        yield
    finally:
        GRANTED.pop(name, None)


@contextmanager
def as_ours(tier: str) -> Iterator[None]:
    """Turn what Ray raises in a call to that tier into errors of ours."""
    try:
        yield
    except RayTaskError as error:
        # Ray's error is an instance of its cause too, but its text is a traceback.
        if isinstance(error.cause, FluxError):
            raise error.cause from None
        if isinstance(error.cause, RayError):
            what = f"a replica of {tier} lost what it needs"
            raise failure_by(error.cause, what) from error
        raise FluxError(f"{tier} failed on this request") from error
    except (TaskCancelledError, ReplicaUnavailableError) as error:
        raise ReplicaFailed(f"a replica of {tier} gave the request up") from error
    except RayServeException as error:
        raise TierUnavailable(f"{tier} cannot serve now", "model") from error
    except RayError as error:
        raise failure_by(error, f"a replica of {tier} died") from error


def failure_by(error: RayError, what: str) -> ReplicaFailed:
    """Return the error for a dead replica, of its own kind if Ray killed it for its memory."""
    if isinstance(error, OutOfMemoryError):
        return KilledForMemory(f"{what}: its node was out of memory")
    return ReplicaFailed(what)


async def result_of(response: Any) -> ImageResult:
    """Return the images that a replica answers with; raise ReplicaFailed if there are none."""
    result = answer_from(await response)
    if not isinstance(result, ImageResult):
        raise ReplicaFailed("a replica answered without the images")
    return result


async def events_of(stream: AsyncIterator[Wire]) -> EventStream:
    """Yield the events of a request that its replica sends, then its result."""
    result: ImageResult | None = None
    values = aiter(stream)
    # Read to its end, or Serve would take the stream for one that was given up. If the end does not
    # come after the result, only a moment is lost.
    while True:
        try:
            answer = await asyncio.wait_for(anext(values), None if result is None else END_S)
        except StopAsyncIteration:
            break
        except (TimeoutError, RayError):
            # A replica that dies after its result has done all that was asked of it.
            if result is None:
                raise
            break
        value = answer_from(answer)
        if isinstance(value, ImageResult):
            result = value
        elif value is not None:
            yield value
    if result is None:
        raise ReplicaFailed("a replica ended its answer before the images")
    yield result
