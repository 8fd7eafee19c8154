"""The router: sends a request to its tier, once more if a replica dies, and never for too long."""

import asyncio
import logging
from typing import Protocol

from flux_ray.errors import DeadlinePassed, ReplicaFailed
from flux_ray.request import ImageRequest, ImageResult

logger = logging.getLogger("ray.serve")


class Handles(Protocol):
    """The way to the tiers' replicas."""

    async def generate(self, request: ImageRequest) -> ImageResult:
        """One attempt on one replica; ReplicaFailed when that replica dies."""

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers that have a running replica."""


class Router:
    """What the gateway calls. Knows neither HTTP nor Ray."""

    def __init__(self, handles: Handles, *, request_timeout_s: float) -> None:
        self.handles = handles
        self.request_timeout_s = request_timeout_s

    async def generate(self, request: ImageRequest) -> ImageResult:
        """The pictures of a request; a second replica draws the same ones, from the same seed."""
        deadline = asyncio.timeout(self.request_timeout_s)
        try:
            async with deadline:
                return await self._generate_with_retry(request)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeadlinePassed(
                f"the request was not done after {self.request_timeout_s:g} seconds"
            ) from None

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers that can serve now."""
        return await self.handles.ready_tiers()

    async def _generate_with_retry(self, request: ImageRequest) -> ImageResult:
        try:
            return await self.handles.generate(request)
        except ReplicaFailed as error:
            logger.warning("request %s is sent again: %s", request.request_id, error)
        return await self.handles.generate(request)
