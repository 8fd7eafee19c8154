"""The router's Ray hands: Serve handles of the tiers, and Ray's errors as ours.

What the replicas of a tier say of themselves: each is asked once, when it comes up.

A tier is redeployed alone, with another layout or other code, and for a while replicas of both
kinds are up.
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
from flux_ray.router.background import keep_running
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

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0

Ask = Callable[[str, str], Awaitable[Description]]
# Told of a tier's replicas that are up, in the order in which they started.
Learn = Callable[[str, tuple[Description, ...]], None]


def learn_nothing(tier: str, descriptions: tuple[Description, ...]) -> None:
    """Nobody wants to know."""


class Descriptions:
    """Of one gateway process. `ask` raises FluxError where a replica does not answer."""

    def __init__(self, ask: Ask, learn: Learn = learn_nothing) -> None:
        self._ask = ask
        self._learn = learn
        self._up: dict[str, tuple[str, ...]] = {}
        self._known: dict[str, dict[str, Description]] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    def see(self, tier: str, replicas: tuple[str, ...]) -> None:
        """Have the new ones among a tier's replicas asked, and forget those that went. Never waits.

        Called as often as one likes: it does nothing while they stay the same.
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
                # Of no request: a client that leaves does not cancel it.
                self._asking[tier, replica] = asyncio.get_running_loop().create_task(
                    self._meet(tier, replica), context=contextvars.Context()
                )

    def of(self, tier: str) -> Mapping[str, Description]:
        """What is known of a tier's replicas, by their names."""
        return self._known.get(tier, {})

    async def _meet(self, tier: str, replica: str) -> None:
        pause_s = FIRST_PAUSE_S
        try:
            while replica in self._up[tier]:
                try:
                    description = await self._ask(tier, replica)
                    # Serve takes another where this one is full.
                    if description.replica == replica:
                        self._note(tier, description)
                        return
                except FluxError as error:
                    logger.info("replica %s of %s cannot be asked yet: %s", replica, tier, error)
                except Exception:
                    # A mistake of ours, or of a newer version that says it otherwise. Given up, it
                    # would be priced wrong for as long as it lives.
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
    """What prices are told of replicas; `card` is that of one whose own has no row.

    `cold_starts` gets what a replica of each tier takes to start.
    """

    def learn(tier: str, descriptions: tuple[Description, ...]) -> None:
        for description in descriptions:
            try:
                args = TierArgs.model_validate(description.args, extra="ignore")
            except ValidationError as error:
                # Of a newer version: priced as the one before it.
                logger.warning("the layout of %s is not known here: %s", tier, error)
                continue
            own = description.card if description.card in SPEEDS else None
            # The newest of them says how the tier will be laid out.
            prices.lay_out(tier, ReplicaSpec.of(args, own or card), description.layout)
            cold_starts[tier] = args.cold_start_s

    return learn


AGAIN_S = 1.0
# A tier's replicas come and go in minutes; a look at what Serve says of them costs nothing.
LOOK_S = 0.25
# A replica answers at once, or hangs.
ASK_S = 10.0
# From a stream's last value to its end.
END_S = 5.0


class TierHandles:
    """One Serve handle a tier. A tier's application bears its name."""

    def __init__(self, tiers: tuple[str, ...], learn: Learn = learn_nothing) -> None:
        self._tiers = tiers
        self._descriptions = Descriptions(self._ask, learn)
        self._readiness = Readiness(tiers, reachable=partial(known_replicas, tiers))
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._connecting: dict[str, asyncio.Future[DeploymentHandle[Any]]] = {}
        # One for each tier, none of the process's: they stand still while the controller is away.
        self._threads = ThreadPoolExecutor(max(1, len(tiers)), thread_name_prefix="handle")
        self._watching: dict[str, asyncio.Task[None]] = {}

    async def generate(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None = None, run: str = ""
    ) -> ImageResult:
        """One attempt on the replica of the request's tier that it was granted.

        Or on one of another version, where that one cannot read the request. ProtocolMismatch if
        there is none. `run`: by what the replica knows it when it comes again.
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
        """What that replica draws or has drawn of an earlier request, under that name.

        ReplicaFailed if it has nothing or cannot be reached, TierUnavailable if it is too old.
        """
        tier = request.tier
        if replica not in self.reachable().get(tier, ()):
            raise ReplicaFailed(f"replica {replica} of {tier} is gone")
        call = pack_recall(tier, request.request_id, run)
        with granted(call, replica), as_ours(tier):
            return await self._attempt(call, on_event)

    async def connect(self, tier: str) -> None:
        """Make its handle, if that is not done. TierUnavailable if the tier is not deployed."""
        # Of one that was, there is still a handle, behind which nobody would ever answer.
        if not self.is_deployed(tier):
            raise not_deployed(tier)
        await self._handle_for(tier)

    def reachable(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the replicas that this process knows of, by tier. Never waits.

        From the first call on the tiers are watched.
        """
        for tier in set(self._tiers) - self._watching.keys():
            self._watching[tier] = keep_running(partial(self._watch, tier), f"watching {tier}")
        return known_replicas(self._tiers)

    def follow_status(self, lose: Callable[[str], None]) -> None:
        """Know from now on which tiers serve and are deployed; `lose` hears of those that end."""
        self._readiness.start(lose)

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers that serve, or would be woken by a request."""
        return await self._readiness.ready_tiers()

    def is_deployed(self, tier: str) -> bool:
        """Say whether Serve has an application of that name, as far as it ever told."""
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
        except asyncio.CancelledError:
            # Serve does this for a client that leaves, but not when our own deadline passes: the
            # replica would go on drawing for nobody.
            response.cancel()
            raise

    async def _handle_for(self, tier: str) -> DeploymentHandle[Any]:
        if tier not in self._handles:
            try:
                handle = await asyncio.shield(self._connection_to(tier))
            except RayServeException as error:
                raise not_deployed(tier) from error
            # With options it learns of its replicas from now on, and not with its first request,
            # which waits for the ledger to grant one of them.
            if tier not in self._handles:
                self._handles[tier] = handle.options(method_name="generate")
        return self._handles[tier]

    def _connection_to(self, tier: str) -> "asyncio.Future[DeploymentHandle[Any]]":
        """Return one call for all who wait for it: it blocks until the controller answers."""
        connecting = self._connecting.get(tier)
        if connecting is None or connecting.done():
            loop = asyncio.get_running_loop()
            connecting = loop.run_in_executor(self._threads, serve.get_app_handle, tier)
            self._connecting[tier] = connecting
        return connecting

    def _other_than(self, protocols: set[int], tier: str) -> str | None:
        """A replica that may read what those of these protocols did not: best one of ours."""
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
    """Return the names of those that Serve has told this process of, by tier."""
    return {tier: REACHABLE[tier] for tier in tiers if tier in REACHABLE}


@contextmanager
def granted(call: Wire, replica: str) -> Iterator[None]:
    """While it is open, Serve is told that this call is for that replica."""
    name = call["tier"], call["request_id"]
    GRANTED[name] = replica
    try:
        yield
    finally:
        GRANTED.pop(name, None)


@contextmanager
def as_ours(tier: str) -> Iterator[None]:
    """Turn whatever Ray raises of a call to that tier into an error of ours."""
    try:
        yield
    except RayTaskError as error:
        # It is an instance of its cause too, but its text is a traceback.
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
    """Return what the router is told of a death: Ray says of some that it killed for memory."""
    if isinstance(error, OutOfMemoryError):
        return KilledForMemory(f"{what}: its node was out of memory")
    return ReplicaFailed(what)


async def result_of(response: Any) -> ImageResult:
    """The result that a replica answers with."""
    result = answer_from(await response)
    if not isinstance(result, ImageResult):
        raise ReplicaFailed("a replica answered without the images")
    return result


async def events_of(stream: AsyncIterator[Wire]) -> EventStream:
    """Yield what a replica tells of a request, then its result."""
    result: ImageResult | None = None
    values = aiter(stream)
    # To its end, or Serve would take it for one that was given up. An end that does not come after
    # the result costs nothing but a moment.
    while True:
        try:
            answer = await asyncio.wait_for(anext(values), None if result is None else END_S)
        except StopAsyncIteration:
            break
        except TimeoutError:
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
