"""The router's Ray hands: Serve handles of the tiers, and Ray's errors as ours."""

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from flux_ray.config import TierArgs
from flux_ray.errors import FluxError, ReplicaFailed, TierUnavailable
from flux_ray.request import Hear, ImageRequest, ImageResult, News
from flux_ray.router.handover import GRANTED, REACHABLE
from flux_ray.router.readiness import Readiness

logger = logging.getLogger("ray.serve")

REPLICA_IS_GONE = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)
AGAIN_S = 1.0
# From a stream's last value to its end.
END_S = 5.0
LearnLayout = Callable[[str, TierArgs], None]


class TierHandles:
    """One Serve handle a tier. A tier's application bears its name."""

    def __init__(
        self, tiers: tuple[str, ...], learn_layout: LearnLayout = lambda tier, args: None
    ) -> None:
        self._tiers = tiers
        self._learn_layout = learn_layout
        self._readiness = Readiness(tiers)
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._meeting: dict[str, asyncio.Task[None]] = {}

    async def generate(
        self, request: ImageRequest, replica: str, hear: Hear | None = None
    ) -> ImageResult:
        """One attempt on the replica of the request's tier that it was granted."""
        GRANTED[request.tier, request.request_id] = replica
        try:
            return await self._attempt(request, hear)
        except RayTaskError as error:
            # It is an instance of its cause too, but its text is a traceback.
            if isinstance(error.cause, FluxError):
                raise error.cause from None
            raise
        except REPLICA_IS_GONE as error:
            raise ReplicaFailed(f"a replica of {request.tier} died") from error
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise TierUnavailable(f"{request.tier} cannot serve now", "model") from error
        finally:
            GRANTED.pop((request.tier, request.request_id), None)

    async def connect(self, tier: str) -> None:
        """Make its handle, if that is not done. TierUnavailable if the tier is not deployed."""
        await self._handle_for(tier)

    def reachable(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the replicas that this process knows of, by tier. Never waits."""
        for tier in set(self._tiers) - self._meeting.keys():
            # Of no request: a client that leaves does not cancel it.
            self._meeting[tier] = asyncio.get_running_loop().create_task(
                self._meet(tier), context=contextvars.Context()
            )
        return {tier: REACHABLE[tier] for tier in self._tiers if tier in REACHABLE}

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers that have a running replica."""
        return await self._readiness.ready_tiers()

    async def _attempt(self, request: ImageRequest, hear: Hear | None) -> ImageResult:
        handle = await self._handle_for(request.tier)
        if hear is None:
            response: Any = handle.remote(request)
        else:
            response = handle.options(method_name="follow", stream=True).remote(request)
        try:
            return await (response if hear is None else last_of(response, hear))
        except asyncio.CancelledError:
            # Serve does this for a client that leaves, but not when our own deadline passes: the
            # replica would go on drawing for nobody.
            response.cancel()
            raise

    async def _handle_for(self, tier: str) -> DeploymentHandle[Any]:
        if tier not in self._handles:
            try:
                # It blocks until the controller answers.
                handle = await asyncio.to_thread(serve.get_app_handle, tier)
            except RayServeException as error:
                raise TierUnavailable(f"{tier} is not deployed", "model") from error
            # With options it learns of its replicas from now on, and not with its first request,
            # which waits for the ledger to grant one of them.
            self._handles[tier] = handle.options(method_name="generate")
        return self._handles[tier]

    async def _meet(self, tier: str) -> None:
        """Connect to a tier as soon as it is deployed, and hear how its replicas are laid out."""
        while True:
            try:
                handle = await self._handle_for(tier)
                # It waits for a replica.
                args = await handle.options(method_name="describe").remote()
            except (TierUnavailable, RayError, RayServeException) as error:
                logger.info("%s cannot be asked yet: %s", tier, error)
                await asyncio.sleep(AGAIN_S)
                continue
            self._learn_layout(tier, args)
            return


async def last_of(stream: AsyncIterator[News | ImageResult], hear: Hear) -> ImageResult:
    """The result that a stream ends with; what comes before it is heard."""
    result: ImageResult | None = None
    values = aiter(stream)
    # To its end, or Serve would take it for one that was given up. An end that does not come after
    # the result costs nothing but a moment.
    while True:
        try:
            value = await asyncio.wait_for(anext(values), None if result is None else END_S)
        except StopAsyncIteration:
            break
        except TimeoutError:
            if result is None:
                raise
            break
        if isinstance(value, ImageResult):
            result = value
        else:
            hear(value)
    if result is None:
        raise ReplicaFailed("a replica ended its answer before the pictures")
    return result
