"""Answer probes: `/health` says that this gateway runs, `/readyz` that a tier can serve."""

import logging

from fastapi import APIRouter

from flux_ray.errors import FluxError, TierUnavailable
from flux_ray.gateway.errors import Envelope
from flux_ray.gateway.probes import HEALTH, READY, readiness_news
from flux_ray.router.router import Router

# The only logger that Serve writes to its log files.
logger = logging.getLogger("ray.serve")


class Health:
    """The two probe routes: `/health` for process monitors, `/readyz` for load balancers."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._was_ready: bool | None = None

    def routes(self) -> APIRouter:
        """Return both routes for GET and HEAD, which some probes send; OpenAPI shows only GET."""
        routes = APIRouter(tags=["health"])
        routes.add_api_route(HEALTH, self.health)
        routes.add_api_route(READY, self.readyz, responses={503: {"model": Envelope}})
        for path, endpoint in ((HEALTH, self.health), (READY, self.readyz)):
            routes.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
        return routes

    async def health(self) -> dict[str, str]:
        """Say that this process answers."""
        return {"status": "ok"}

    async def readyz(self) -> dict[str, tuple[str, ...]]:
        """Return the tiers that can serve now.

        Answers 503 if no tier can, or if this gateway cannot reach the ledger.
        """
        try:
            tiers = await self._ready_tiers()
        except FluxError as error:
            self._note(str(error))
            raise
        self._note(None)
        return {"tiers": tiers}

    async def _ready_tiers(self) -> tuple[str, ...]:
        if not self.router.hears_ledger():
            raise TierUnavailable("this gateway cannot reach the ledger")
        tiers = await self.router.ready_tiers()
        if not tiers:
            raise TierUnavailable("no tier can serve now")
        return tiers

    def _note(self, reason: str | None) -> None:
        """Log a change of readiness once: probes come about every second."""
        news = readiness_news(self._was_ready, reason)
        self._was_ready = reason is None
        if news is not None:
            logger.log(*news)
