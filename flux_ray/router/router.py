"""The router: prices a request, waits for its turn, and sends it once more if a replica dies."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from flux_ray.errors import DeadlinePassed, Overloaded, ReplicaFailed
from flux_ray.request import ImageRequest, ImageResult
from flux_ray.router.calibration import Observation
from flux_ray.router.ledger import Offer
from flux_ray.router.pricing import CostModel

logger = logging.getLogger("ray.serve")


class Handles(Protocol):
    """The way to the tiers' replicas."""

    async def connect(self, tier: str) -> None:
        """TierUnavailable if the tier is not deployed."""

    async def generate(self, request: ImageRequest, replica: str) -> ImageResult:
        """One attempt on that replica; ReplicaFailed when it dies."""

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers that have a running replica."""


class Turns(Protocol):
    """The way to the ledger, which grants replicas."""

    async def take(self, offer: Offer) -> str:
        """The replica whose turn it is, when it is; Overloaded if the deadline cannot be met."""

    def end(self, ticket_id: str) -> None:
        """The turn is over."""


class Bill(Protocol):
    """Where prices, their errors and refusals are counted."""

    def enter(self, tier: str, gpu_seconds: float) -> None:
        """A request was taken in at that price."""

    def compare(self, observations: Iterable[Observation]) -> None:
        """What was measured, beside what had been predicted."""

    def refuse(self, tier: str) -> None:
        """A request could not be done in time."""


class Router:
    """What the gateway calls. Knows neither HTTP nor Ray."""

    def __init__(
        self,
        handles: Handles,
        turns: Turns,
        prices: CostModel,
        bill: Bill,
        *,
        request_timeout_s: float,
    ) -> None:
        self.handles = handles
        self.turns = turns
        self.prices = prices
        self.bill = bill
        self.request_timeout_s = request_timeout_s

    async def generate(
        self, request: ImageRequest, *, deadline_s: float | None = None, key: str = ""
    ) -> ImageResult:
        """The pictures of a request; a second replica draws the same ones, from the same seed.

        `deadline_s`: refused at once, or later when it has become impossible, if it cannot be done
        within so many seconds. `key`: whose requests share what there is with those of others.
        """
        deadline = asyncio.timeout(self.request_timeout_s)
        try:
            async with deadline:
                return await self._generate_with_retry(request, deadline_s, key)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeadlinePassed(
                f"the request was not done after {self.request_timeout_s:g} seconds"
            ) from None

    async def ready_tiers(self) -> tuple[str, ...]:
        """The tiers that can serve now."""
        return await self.handles.ready_tiers()

    async def _generate_with_retry(
        self, request: ImageRequest, deadline_s: float | None, key: str
    ) -> ImageResult:
        wanted_s = self.request_timeout_s if deadline_s is None else deadline_s
        try:
            return await self._attempt(request, 1, wanted_s, key)
        except ReplicaFailed as error:
            logger.warning("request %s is sent again: %s", request.request_id, error)
        # It was taken in once: it is not refused now for what was no fault of its client.
        return await self._attempt(request, 2, self.request_timeout_s, key)

    async def _attempt(
        self, request: ImageRequest, number: int, deadline_s: float, key: str
    ) -> ImageResult:
        # It would wait for its turn for ever.
        await self.handles.connect(request.tier)
        cost_s = self.prices.price(request).total_s
        ticket_id = f"{request.request_id}-{number}"
        offer = Offer(ticket_id, request.tier, cost_s, min(deadline_s, self.request_timeout_s), key)
        try:
            replica = await self.turns.take(offer)
        except Overloaded:
            self.bill.refuse(request.tier)
            raise
        self.bill.enter(request.tier, self.prices.gpu_seconds(request))
        try:
            result = await self.handles.generate(request, replica)
        finally:
            self.turns.end(ticket_id)
        self.bill.compare(self.prices.learn(request, result.times))
        return result
