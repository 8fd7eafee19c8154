"""Tiers whose replicas are nothing but that, for tests of how many there are."""

from ray import serve
from ray.serve import Application

from flux_ray.app import replicas_of
from flux_ray.config.tier import TierArgs
from tests.cluster.unranked_replica import Unranked


def build_tier(args: TierArgs) -> Application:
    """As many as the tier's args and the ledger say; they take neither a processor nor a GPU."""
    deployment = serve.deployment(
        name=args.tier,
        **replicas_of(args),
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.1,
    )(Unranked)
    return deployment.bind()
