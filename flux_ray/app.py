"""The deployment graph on one page: one application a tier, and the gateway in front of them.

A Serve config file names these builders and gives their args (serve/*.yaml).
"""

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from flux_ray.config import GatewayArgs, TierArgs
from flux_ray.gateway.api import build_api
from flux_ray.replica.group import bundles_for
from flux_ray.replica.leader import Leader
from flux_ray.router.handles import TierHandles
from flux_ray.router.router import Router

# A leader that ended is replaced at the next check; one that hangs, after three of them.
HEALTH_CHECK_PERIOD_S = 1
HEALTH_CHECK_TIMEOUT_S = 5


@serve.ingress()
class Gateway:
    """The replica that speaks HTTP; it reaches the tiers by their handles."""

    def __init__(self, args: GatewayArgs) -> None:
        self._args = args

    async def __serve_build_asgi_app__(self) -> FastAPI:
        args = self._args
        router = Router(TierHandles(args.tiers), request_timeout_s=args.request_timeout_s)
        return build_api(router, args, proxy_sends_id=True)


def build_gateway(args: GatewayArgs) -> Application:
    """The application that clients speak to."""
    deployment = serve.deployment(
        name="gateway",
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=args.drain_timeout_s,
    )(Gateway)
    return deployment.bind(args)


def build_tier(args: TierArgs) -> Application:
    """The application of one tier, reached by its handle only. Name it as the tier."""
    deployment = serve.deployment(
        name=args.tier,
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        # The leader needs nothing: the bundles are its ranks'.
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=bundles_for(args),
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=args.drain_timeout_s,
    )(Leader)
    return deployment.bind(args)
