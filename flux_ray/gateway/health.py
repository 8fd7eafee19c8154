"""Whether this gateway is alive, and whether a tier behind it can serve."""

from fastapi import APIRouter

from flux_ray.errors import TierUnavailable
from flux_ray.gateway.failures import Envelope
from flux_ray.router.router import Router

# These are answered whatever else this gateway has in hand.
HEALTH, READY = "/health", "/readyz"
PROBES = frozenset({HEALTH, READY})


class Health:
    """`/health` for process monitors, `/readyz` for load balancers."""

    def __init__(self, router: Router) -> None:
        self.router = router

    def routes(self) -> APIRouter:
        """Both answer GET, and HEAD, which some probes send; OpenAPI describes GET."""
        routes = APIRouter(tags=["health"])
        routes.add_api_route(HEALTH, self.health)
        routes.add_api_route(READY, self.readyz, responses={503: {"model": Envelope}})
        for path, endpoint in ((HEALTH, self.health), (READY, self.readyz)):
            routes.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
        return routes

    async def health(self) -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    async def readyz(self) -> dict[str, tuple[str, ...]]:
        """The tiers that can serve now; 503 where there is none, or no ledger to grant turns."""
        if not self.router.hears_ledger():
            raise TierUnavailable("this gateway cannot reach the ledger")
        tiers = await self.router.ready_tiers()
        if not tiers:
            raise TierUnavailable("no tier can serve now")
        return {"tiers": tiers}
