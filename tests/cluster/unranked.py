"""Tiers whose replicas have no ranks and no model, for tests of the number of replicas."""

from ray import serve
from ray.serve import Application

from flux_ray.app import replicas_of
from flux_ray.config.tier import TierArgs
from tests.cluster.unranked_replica import Unranked


def build_tier(args: TierArgs) -> Application:
    """Build a tier whose replicas use no CPU and no GPU; arguments and ledger say how many."""
    deployment = serve.deployment(
        name=args.tier,
        **replicas_of(args),
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.1,
    )(Unranked)
    return deployment.bind()
