"""How long a replica that is taken away may take for what it has in hand: its longest request."""

import math

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.gateway import GatewayArgs, Limits
from flux_ray.config.tier import TierArgs
from flux_ray.router.pricing.cost import ReplicaSpec, RequestShape, price

# A replica's card is known when the replica is up, and this is asked before: as gateways price.
CARD: str = GatewayArgs.model_fields["card"].default
# Prices may be as much too low before anything was measured.
MARGIN = 1.5
# Files of the last images are made when the ranks are done, and other processes take their time.
MIN_S = 20.0
# Gateways give up what takes longer than their `request_timeout_s`, and wait so long themselves.
MAX_S: float = GatewayArgs.model_fields["drain_timeout_s"].default


def drain_timeout_s(args: TierArgs) -> float:
    """As the args have it, or for the longest request by its price, on a processor or on `CARD`."""
    if args.drain_timeout_s is not None:
        return args.drain_timeout_s
    longest_s = price(longest_work(args.tier), ReplicaSpec.of(args, CARD)).total_s
    return min(MAX_S, max(MIN_S, math.ceil(MARGIN * longest_s)))


def longest_work(tier: str) -> RequestShape:
    """The most and the largest images, with the most references, in the tier's own steps.

    Of more steps than those, which make no distilled tier better, one image takes about as long.
    Who asks for more of everything is served by another replica where this one has to end.
    """
    row = tier_for(tier)
    side = math.isqrt(row.max_pixels)
    references = (row.max_reference_pixels,) * row.max_references
    return RequestShape(tier, side, side, row.num_steps, references, Limits().max_images)
