"""A tier whose last rank fails on demand."""

from ray.serve import Application

from flux_ray.app import tier_application
from flux_ray.config.tier import TierArgs
from flux_ray.replica.leader import Leader
from tests.cluster.faulty_rank import FaultyRank


class FaultyLeader(Leader):
    """A leader whose ranks are FaultyRank."""

    rank_class = FaultyRank


def build_tier(args: TierArgs) -> Application:
    """Build the tier with such leaders, in place of flux_ray.app:build_tier."""
    return tier_application(args, FaultyLeader)
