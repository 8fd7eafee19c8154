"""What of a gateway's config no cluster could do: found when it is read, not by its clients.

How long a replica that is taken away may take for what it has in hand: its longest request.
"""

import math

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.gateway import GatewayArgs, Limits
from flux_ray.config.tier import TierArgs
from flux_ray.router.pricing.cost import ReplicaSpec, RequestShape, price


def check_possible(args: GatewayArgs) -> None:
    """ValueError names a key that leaves no tier enough for its default image."""
    for tier, deadline_s in args.deadlines.items():
        check_deadline(f"deadlines.{tier}", deadline_s, (tier,), args.card)
    for name, key_class in args.key_classes.items():
        usable = tuple(tier for tier in args.tiers if key_class.may_use(tier))
        if not usable:
            raise ValueError(f"key_classes.{name}.licenses: none of its tiers has one of them")
        if key_class.deadline_s is not None:
            key = f"key_classes.{name}.deadline_s"
            check_deadline(key, key_class.deadline_s, usable, args.card)
    for name in args.aliases:
        alias = args.alias_for(name)
        if alias is not None and alias.max_gpu_seconds is not None:
            check_price(name, alias.max_gpu_seconds, alias.tiers, args.card)


def check_price(name: str, max_gpu_seconds: float, tiers: tuple[str, ...], card: str) -> None:
    """It suffices for a default image of one of the tiers; quantized, that may be half."""
    least_s = min(default_s(tier, ReplicaSpec(card)) for tier in tiers)
    if max_gpu_seconds < least_s / 2:
        raise ValueError(
            f"aliases.{name}.max_gpu_seconds: {max_gpu_seconds:g} is impossible: a default image"
            f" takes {least_s:.2g}"
        )


def check_deadline(key: str, deadline_s: float, tiers: tuple[str, ...], card: str) -> None:
    """It suffices for a default image of one of the tiers."""
    # The fastest that eight cards make of any tier: split by tokens, with weights of a byte.
    layout = ReplicaSpec(card, tensor=2, sequence=4, quantization="fp8", encoder_quantization="fp8")
    least_s = min(default_s(tier, layout) for tier in tiers)
    if deadline_s < least_s:
        raise ValueError(
            f"{key}: {deadline_s:g} s is impossible: a default image takes {least_s:.2g} s on"
            f" eight cards of {card}"
        )


def default_s(tier: str, layout: ReplicaSpec) -> float:
    """Seconds of a replica for a tier's default image."""
    row = tier_for(tier)
    return price(
        RequestShape(tier, row.default_side, row.default_side, row.num_steps), layout
    ).total_s


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
