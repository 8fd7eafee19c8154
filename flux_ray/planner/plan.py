"""Plan a deployment before anything of it is started: what each GPU holds, and whether it fits.

For each tier the plan also names the cheapest placement that fits, changes of the config that need
fewer GPUs, and a faster placement if GPUs are left over. Last come the memory figures that were
published for these models, next to ours, with the reason for the difference.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flux_ray.catalog import Gpu, card_for, tier_for
from flux_ray.config import Parallel, TierArgs
from flux_ray.engine.registry import empty_model, family_of
from flux_ray.planner.candidate import (
    ActivationDemand,
    Candidate,
    Footprint,
    default_demand,
    largest_demand,
)

# A planned replica stays in one node, of at most 8 GPUs.
TENSOR_DEGREES = (1, 2, 4, 8)
# Without NVLink, more tensor ranks than these wait longer for each other than they compute.
MAX_TENSOR_OVER_PCIE = 2
FP8 = {"quantization": "fp8", "encoder_quantization": "fp8"}
NF4 = {"quantization": "nf4", "encoder_quantization": "nf4"}
SHARED = {"text_encoder": "shared"}
# What an operator may change to need fewer GPUs, mildest first. The plan names these changes and
# never makes them: whether they are worth it is the operator's decision.
CHANGES: tuple[dict[str, str], ...] = (SHARED, FP8, FP8 | SHARED, NF4, NF4 | SHARED)
GB = 10**9
# All of Mistral-Small-3.2-24B with its vision tower in FP8: 1 byte for each number of the layers'
# linears, 2 for the rest.
WHOLE_ENCODER_FP8_BYTES = 25_790_000_000


@dataclass(frozen=True)
class PlacementOption:
    """A way to place one replica: changes to the config, its ranks, and the bytes on each GPU.

    `encoder_bytes`: the bytes of one more GPU, if all replicas share a text encoder. `is_slow`: it
    has more tensor ranks than the links between the GPUs are good for.
    """

    changes: dict[str, str]
    tensor: int
    sequence: int
    rank_bytes: int
    encoder_bytes: int | None
    is_slow: bool = False


@dataclass(frozen=True)
class PublishedFigure:
    """A published memory figure, ours for one GPU that holds it all, and why they differ."""

    published: str
    our_bytes: int
    why: str


@dataclass(frozen=True)
class GpuPlan:
    """What one GPU holds during the tier's largest request.

    `ranks`: the ranks with such a GPU each; empty for a shared text encoder. `default_bytes`: the
    total for an image of the tier's default size without references.
    """

    ranks: tuple[int, ...]
    bytes: Footprint
    total_bytes: int
    default_bytes: int
    fits: bool
    fits_default: bool


@dataclass(frozen=True)
class TierPlan:
    """One tier of the config, and how else it could be placed.

    `num_gpus` counts the GPUs of all its replicas and of a shared text encoder, 0 on CPUs. Of the
    transformer's `num_parameters` each tensor rank has `num_whole_parameters` whole.
    """

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
    num_parameters: int
    num_whole_parameters: int
    fits: bool
    cheapest: PlacementOption | None
    alternatives: tuple[PlacementOption, ...]
    fastest: PlacementOption | None
    claims: tuple[PublishedFigure, ...]


@dataclass(frozen=True)
class Plan:
    """The whole deployment on `count` GPUs of one kind; `num_gpus` is how many it needs."""

    card: Gpu
    count: int
    num_gpus: int
    fits: bool
    tiers: tuple[TierPlan, ...]


def make_plan(tiers: Sequence[TierArgs], card_name: str, count: int) -> Plan:
    """Return the plan of a config's tiers on `count` GPUs of this kind.

    A deployment that does not fit is still planned. Raise ValueError for settings that no GPU could
    run, and for an unknown kind of GPU.
    """
    card = card_for(card_name)
    plans = tuple(plan_tier(args, card, count) for args in tiers)
    num_gpus = sum(plan.num_gpus for plan in plans)
    fits = num_gpus <= count and all(plan.fits for plan in plans)
    return Plan(card, count, num_gpus, fits, plans)


def plan_tier(args: TierArgs, card: Gpu, count: int) -> TierPlan:
    """Return the plan of one tier; on CPUs bytes are only counted, nothing is compared or chosen.

    Raise ValueError, with the tier's name, if the loader would refuse its args.
    """
    tier = tier_for(args.tier)
    on_cuda = args.device == "cuda"
    try:
        candidate = Candidate(
            empty_model(tier, args.weights), tier, args, card if on_cuda else None
        )
        cards = card_plans(candidate)
    except (OSError, ValueError) as error:
        raise ValueError(f"tier {args.tier}: {error}") from error
    num_parameters, num_whole = candidate.num_parameters()
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
        num_parameters=num_parameters,
        num_whole_parameters=num_whole,
        fits=all(planned.fits for planned in cards),
        cheapest=chosen,
        alternatives=alternatives(candidate, count) if on_cuda else (),
        fastest=fastest(candidate, count, chosen.tensor) if chosen else None,
        claims=claims_for(candidate),
    )


def card_plans(candidate: Candidate) -> tuple[GpuPlan, ...]:
    """Return the plan of the ranks' GPUs, and that of a shared text encoder's if there is one."""
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
    """Compare the footprints at the largest and at the default request with a GPU's memory."""
    limit = float("inf") if card is None else card.usable_bytes
    return GpuPlan(
        ranks, largest, largest.total, usual.total, largest.total <= limit, usual.total <= limit
    )


def cheapest(candidate: Candidate, count: int) -> PlacementOption | None:
    """Return the placement with the fewest tensor ranks that fits, without changing the config."""
    return next(fitting(candidate, count, {}), None)


def alternatives(candidate: Candidate, count: int) -> tuple[PlacementOption, ...]:
    """Return placements that need fewer ranks than the cheapest, by changes to the config.

    If none fits without changes, the first may be one that fits but is slow.
    """
    chosen = cheapest(candidate, count)
    found = list(slower(candidate, count)) if chosen is None else []
    fewest: dict[str, int] = {}
    for changes in CHANGES:
        layout = next(fitting(candidate, count, changes), None)
        if layout is None or (chosen is not None and layout.tensor >= chosen.tensor):
            continue
        # A shared text encoder costs a GPU more, so options are compared only with their like.
        place = changes.get("text_encoder", candidate.args.text_encoder)
        if layout.tensor < fewest.get(place, layout.tensor + 1):
            fewest[place] = layout.tensor
            found.append(layout)
    return tuple(found)


def fastest(candidate: Candidate, count: int, tensor: int) -> PlacementOption | None:
    """Return the placement with the most sequence ranks on top of the `tensor` ranks, or None.

    Once the weights fit, more sequence ranks reduce the latency further than more tensor ranks.
    """
    if family_of(candidate.tier).is_for_one_gpu:
        return None
    num_free = num_for_ranks(candidate, count, {})
    for sequence in (8, 4, 2):
        parallel = {"tensor": tensor, "sequence": sequence}
        if tensor * sequence <= min(num_free, max(TENSOR_DEGREES)):
            layout = layout_of(candidate, {}, Parallel(**parallel))
            if layout is not None:
                return layout
    return None


def fitting(candidate: Candidate, count: int, changes: dict[str, str]) -> Iterator[PlacementOption]:
    """Yield the placements that fit with these changes, the fewest tensor ranks first."""
    assert candidate.card is not None
    for tensor in degrees(candidate, count, changes):
        if not candidate.card.has_nvlink and tensor > MAX_TENSOR_OVER_PCIE:
            return
        layout = layout_of(candidate, changes, Parallel(tensor=tensor))
        if layout is not None:
            yield layout


def slower(candidate: Candidate, count: int) -> Iterator[PlacementOption]:
    """Yield the first placement that fits, but with more tensor ranks than PCIe is good for."""
    for tensor in degrees(candidate, count, {}):
        if tensor > MAX_TENSOR_OVER_PCIE:
            layout = layout_of(candidate, {}, Parallel(tensor=tensor))
            if layout is not None:
                yield replace(layout, is_slow=True)
                return


def degrees(candidate: Candidate, count: int, changes: dict[str, str]) -> Iterator[int]:
    """Yield the numbers of tensor ranks for which there are enough GPUs."""
    num_free = num_for_ranks(candidate, count, changes)
    is_single = family_of(candidate.tier).is_for_one_gpu
    for tensor in TENSOR_DEGREES[:1] if is_single else TENSOR_DEGREES:
        if tensor <= num_free:
            yield tensor


def num_for_ranks(candidate: Candidate, count: int, changes: dict[str, str]) -> int:
    """Return the GPUs that are left for ranks: all, less one if the text encoder is shared."""
    place = changes.get("text_encoder", candidate.args.text_encoder)
    return count - (place == "shared")


def layout_of(
    candidate: Candidate, changes: dict[str, str], parallel: Parallel
) -> PlacementOption | None:
    """Return the placement, or None if it is impossible or does not fit at the largest request."""
    assert candidate.card is not None, "a processor's memory is not planned"
    update: dict[str, Any] = {**changes, "parallel": parallel}
    tried = replace(candidate, args=candidate.args.model_copy(update=update))
    try:
        rank_bytes = tried.rank(largest_demand(candidate.tier)).total
    except ValueError:
        # The heads do not divide by the ranks, or the quantization cannot be split.
        return None
    is_shared = tried.args.text_encoder == "shared"
    encoder_bytes = tried.shared_encoder().total if is_shared else None
    if max(rank_bytes, encoder_bytes or 0) > candidate.card.usable_bytes:
        return None
    return PlacementOption(changes, parallel.tensor, parallel.sequence, rank_bytes, encoder_bytes)


def claims_for(candidate: Candidate) -> tuple[PublishedFigure, ...]:
    """Return what was published about the tier's model; nothing if its shapes are different."""
    if not candidate.model.is_published(candidate.tier):
        return ()
    if candidate.tier.name == "flux-2-dev":
        return (full(candidate), fp8(candidate))
    if candidate.tier.name == "flux-2-klein-4b":
        return (klein(candidate),)
    return ()


def full(candidate: Candidate) -> PublishedFigure:
    """Return the figure "90 GB full" for dev, next to our bf16 weights."""
    whole = on_one_card(candidate, None)
    transformer, vae = whole.transformer_bytes(), whole.rank(default_demand(whole.tier)).vae
    encoder = whole.encoder_bytes(1)
    mixed = transformer + WHOLE_ENCODER_FP8_BYTES + vae
    return PublishedFigure(
        "90 GB full",
        transformer + encoder + vae,
        f"{mixed / GB:.1f} = bf16 transformer {transformer / GB:.1f} + all of the 24B encoder in"
        f" FP8 {WHOLE_ENCODER_FP8_BYTES / GB:.1f} + VAE {vae / GB:.1f}; ours, weights too, has"
        f" 30 of its 40 layers in bf16, {encoder / GB:.1f}",
    )


def fp8(candidate: Candidate) -> PublishedFigure:
    """Return the figure "about 54 GB FP8" for dev, next to our total in FP8."""
    footprint = on_one_card(candidate, "fp8").rank(default_demand(candidate.tier))
    weights = footprint.transformer + footprint.text_encoder + footprint.vae
    return PublishedFigure(
        "about 54 GB FP8",
        footprint.total,
        f"weights {weights / GB:.1f}, of the encoder 30 layers, + about 3 to run, as we read it;"
        " ours is at 1024x1024 on one card",
    )


def klein(candidate: Candidate) -> PublishedFigure:
    """Return the figure "about 8 GB klein 4B", next to our total in bf16."""
    footprint = on_one_card(candidate, None).rank(default_demand(candidate.tier))
    return PublishedFigure(
        "about 8 GB klein 4B",
        footprint.total,
        f"that is the bf16 transformer alone, {footprint.transformer / GB:.2f}; drawing 1024x1024"
        f" takes the encoder's {footprint.text_encoder / GB:.1f}, VAE, activations and CUDA too",
    )


def on_one_card(candidate: Candidate, precision: str | None) -> Candidate:
    """Return the same model on a single GPU, in bf16 or with its linears in `precision`."""
    update = {
        "dtype": "bfloat16",
        "parallel": Parallel(),
        "text_encoder": "colocated",
        "quantization": precision,
        "encoder_quantization": precision,
    }
    return replace(candidate, args=candidate.args.model_copy(update=update))
