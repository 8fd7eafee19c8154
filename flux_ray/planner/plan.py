"""What a deployment needs, counted before anything of it is started."""

from collections.abc import Sequence
from dataclasses import dataclass

from flux_ray.catalog.gpus import Gpu, card_for
from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import TierArgs
from flux_ray.planner.activations import ActivationDemand, default_demand, largest_demand
from flux_ray.planner.architectures import empty_model
from flux_ray.planner.candidate import Candidate
from flux_ray.planner.footprint import Footprint
from flux_ray.planner.layouts import PlacementOption, alternatives, cheapest, fastest
from flux_ray.planner.published import PublishedFigure, claims_for


@dataclass(frozen=True)
class GpuPlan:
    """What is on a card at the largest request; `ranks` is empty for a shared text encoder's.

    `default_bytes` is the total at a picture of the tier's default size without references.
    """

    ranks: tuple[int, ...]
    bytes: Footprint
    total_bytes: int
    default_bytes: int
    fits: bool
    fits_default: bool


@dataclass(frozen=True)
class TierPlan:
    """One tier of the config, and how else it could be laid out. `num_gpus` is of all replicas."""

    tier: str
    device: str
    dtype: str
    source: str
    num_replicas: int
    tensor: int
    sequence: int
    quantization: str | None
    encoder_quantization: str | None
    text_encoder: str
    largest: ActivationDemand
    cards: tuple[GpuPlan, ...]
    num_gpus: int
    fits: bool
    cheapest: PlacementOption | None
    alternatives: tuple[PlacementOption, ...]
    fastest: PlacementOption | None
    claims: tuple[PublishedFigure, ...]


@dataclass(frozen=True)
class Plan:
    """The whole deployment on `count` cards of one kind."""

    card: Gpu
    count: int
    num_gpus: int
    fits: bool
    tiers: tuple[TierPlan, ...]


def make_plan(tiers: Sequence[TierArgs], card_name: str, count: int) -> Plan:
    """The plan of a config's tiers; ValueError names what is impossible whatever the card."""
    card = card_for(card_name)
    plans = tuple(plan_tier(args, card, count) for args in tiers)
    num_gpus = sum(plan.num_gpus for plan in plans)
    fits = num_gpus <= count and all(plan.fits for plan in plans)
    return Plan(card, count, num_gpus, fits, plans)


def plan_tier(args: TierArgs, card: Gpu, count: int) -> TierPlan:
    """One tier; on a processor there is no card to fill, and nothing to choose."""
    tier = tier_for(args.tier)
    on_cuda = args.device == "cuda"
    try:
        candidate = Candidate(
            empty_model(tier, args.weights), tier, args, card if on_cuda else None
        )
        cards = card_plans(candidate)
    except (OSError, ValueError) as error:
        raise ValueError(f"tier {args.tier}: {error}") from error
    chosen = cheapest(candidate, count) if on_cuda else None
    is_shared = args.text_encoder == "shared"
    return TierPlan(
        tier=args.tier,
        device=args.device,
        dtype=args.dtype,
        source=candidate.model.source,
        num_replicas=args.num_replicas,
        tensor=args.parallel.tensor,
        sequence=args.parallel.sequence,
        quantization=args.quantization,
        encoder_quantization=args.encoder_quantization,
        text_encoder=args.text_encoder,
        largest=largest_demand(tier),
        cards=cards,
        num_gpus=args.num_replicas * args.parallel.num_ranks + is_shared if on_cuda else 0,
        fits=all(planned.fits for planned in cards),
        cheapest=chosen,
        alternatives=alternatives(candidate, count) if on_cuda else (),
        fastest=fastest(candidate, count, chosen.tensor) if chosen else None,
        claims=claims_for(candidate),
    )


def card_plans(candidate: Candidate) -> tuple[GpuPlan, ...]:
    """The card of each rank, and that of the text encoder where it is apart."""
    ranks = tuple(range(candidate.args.parallel.num_ranks))
    largest = candidate.rank(largest_demand(candidate.tier))
    usual = candidate.rank(default_demand(candidate.tier))
    cards = [card_plan(ranks, largest, usual, candidate.card)]
    if candidate.args.text_encoder == "shared":
        shared = candidate.shared_encoder()
        cards.append(card_plan((), shared, shared, candidate.card))
    return tuple(cards)


def card_plan(
    ranks: tuple[int, ...], largest: Footprint, usual: Footprint, card: Gpu | None
) -> GpuPlan:
    """The footprints held against the card."""
    limit = float("inf") if card is None else card.usable_bytes
    return GpuPlan(
        ranks, largest, largest.total, usual.total, largest.total <= limit, usual.total <= limit
    )
