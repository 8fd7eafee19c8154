"""What gateways learned of prices, shared through the ledger: it outlives any one of them."""

import asyncio
import logging
from typing import Protocol

from flux_ray.router.background import keep_running
from flux_ray.router.ledger.client import LedgerLost
from flux_ray.router.pricing.calibration import Snapshot
from flux_ray.router.pricing.cost_model import CostModel

logger = logging.getLogger("ray.serve")

PRICES_PERIOD_S = 5.0


class PriceTransport(Protocol):
    """The way to the ledger."""

    async def share_prices(self, snapshot: Snapshot) -> Snapshot:
        """What all gateways know, this one included. Raises LedgerLost."""


class PriceExchange:
    """Tells the ledger of this gateway's prices, and learns those of the others."""

    def __init__(self, exchange: PriceTransport, prices: CostModel) -> None:
        self._exchange = exchange
        self._prices = prices
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on, every few seconds."""
        self._task = keep_running(self._run, "the exchange of prices")

    async def _run(self) -> None:
        while True:
            await self.share()
            await asyncio.sleep(PRICES_PERIOD_S)

    async def share(self) -> None:
        """Once; a ledger that is away is told the next time."""
        try:
            known = await self._exchange.share_prices(self._prices.snapshot())
        except LedgerLost as error:
            logger.warning("prices are not shared: %s", error)
            return
        self._prices.restore(known)
