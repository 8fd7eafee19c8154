"""Check a config against prices: what no cluster could do, and how long a replica may drain.

An impossible deadline or price limit is found when the config is read, not by the first client.
A replica that is taken away gets the time of its longest possible request (`drain_timeout_s`).
"""

import math
from dataclasses import replace

from flux_ray.catalog import tier_for
from flux_ray.config import GatewayArgs, Limits, TierArgs
from flux_ray.router.pricing.cost import ReplicaSpec, RequestShape, price, work_at


def check_possible(args: GatewayArgs) -> None:
    """Raise ValueError, naming the key, if a limit leaves no tier enough for its default image.

    Checked are the deadlines of tiers and of key classes, and `max_gpu_seconds` of aliases.
    """
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
    """Raise ValueError unless an alias's limit pays for a default image on one of its tiers."""
    least_s = min(default_s(tier, ReplicaSpec(card)) for tier in tiers)
    # Half: prices here are those without quantization, which may halve them.
    if max_gpu_seconds < least_s / 2:
        raise ValueError(
            f"aliases.{name}.max_gpu_seconds: {max_gpu_seconds:g} is impossible: a default image"
            f" takes {least_s:.2g}"
        )


def check_deadline(key: str, deadline_s: float, tiers: tuple[str, ...], card: str) -> None:
    """Raise ValueError unless one of the tiers can make a default image within the deadline."""
    # The fastest that any tier gets on eight GPUs: split by tokens, with weights of one byte.
    layout = ReplicaSpec(card, tensor=2, sequence=4, quantization="fp8", encoder_quantization="fp8")
    least_s = min(default_s(tier, layout) for tier in tiers)
    if deadline_s < least_s:
        raise ValueError(
            f"{key}: {deadline_s:g} s is impossible: a default image takes {least_s:.2g} s on"
            f" eight cards of {card}"
        )


def default_s(tier: str, layout: ReplicaSpec) -> float:
    """Return the replica seconds of a tier's default image, of a short prompt, in this layout."""
    row = tier_for(tier)
    work = work_at(tier, row.default_side, row.default_side, row.num_steps)
    return price(replace(work, num_text=row.text_tokens("")), layout).total_s


# A replica's GPU is known only when the replica is up, but this is needed earlier. Gateways price
# by the same default until a replica has told them.
CARD: str = GatewayArgs.model_fields["card"].default
# Before anything was measured, prices may be too low by this factor.
MARGIN = 1.5
# Image files are still to be made when the ranks are done, and other processes are slow to stop.
MIN_S = 20.0
# No more than gateways wait for themselves: they give up what takes longer.
MAX_S: float = GatewayArgs.model_fields["drain_timeout_s"].default


def drain_timeout_s(args: TierArgs) -> float:
    """Return the seconds that a replica of these args may take to finish its requests.

    The args may say it. Otherwise it is the price of the longest request, on a processor or on
    `CARD`, times MARGIN, between MIN_S and MAX_S.
    """
    if args.drain_timeout_s is not None:
        return args.drain_timeout_s
    longest_s = price(longest_work(args.tier), ReplicaSpec.of(args, CARD)).total_s
    return min(MAX_S, max(MIN_S, math.ceil(MARGIN * longest_s)))


def longest_work(tier: str) -> RequestShape:
    """Return the longest request to wait for: most and largest images, references and forwards.

    It has the tier's own number of steps. More steps make no distilled tier better, and one image
    with more of them takes about as long as this. A request that asks for more of everything is
    generated again on another replica if this one has to end.
    """
    row = tier_for(tier)
    side = math.isqrt(row.max_pixels)
    num_images = Limits().max_images
    work = work_at(tier, side, side, row.num_steps, row.max_references, num_images)
    return replace(work, num_forwards=2, num_prompts=2) if row.takes_negative else work
