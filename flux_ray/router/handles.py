"""The router's Ray hands: Serve handles of the tiers, and Ray's errors as ours."""

import asyncio
from typing import Any

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from flux_ray.errors import FluxError, ReplicaFailed, TierUnavailable
from flux_ray.request import ImageRequest, ImageResult
from flux_ray.router.readiness import Readiness

REPLICA_IS_GONE = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)


class TierHandles:
    """One Serve handle a tier, made when first needed. A tier's application bears its name."""

    def __init__(self, tiers: tuple[str, ...]) -> None:
        self._readiness = Readiness(tiers)
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    async def generate(self, request: ImageRequest) -> ImageResult:
        """One attempt on one replica of the request's tier."""
        try:
            return await self._attempt(request)
        except RayTaskError as error:
            # It is an instance of its cause too, but its text is a traceback.
            if isinstance(error.cause, FluxError):
                raise error.cause from None
            raise
        except REPLICA_IS_GONE as error:
            raise ReplicaFailed(f"a replica of {request.tier} died") from error
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise TierUnavailable(f"{request.tier} cannot serve now", "model") from error

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers that have a running replica."""
        return await self._readiness.ready_tiers()

    async def _attempt(self, request: ImageRequest) -> ImageResult:
        handle = await self._handle_for(request.tier)
        response = handle.generate.remote(request)
        try:
            result: ImageResult = await response
        except asyncio.CancelledError:
            # Serve does this for a client that leaves, but not when our own deadline passes: the
            # replica would go on drawing for nobody.
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        return result

    async def _handle_for(self, tier: str) -> DeploymentHandle[Any]:
        if tier not in self._handles:
            try:
                # It blocks until the controller answers.
                self._handles[tier] = await asyncio.to_thread(serve.get_app_handle, tier)
            except RayServeException as error:
                raise TierUnavailable(f"{tier} is not deployed", "model") from error
        return self._handles[tier]
