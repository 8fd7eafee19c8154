"""The cheapest layout of a tier that fits, and what else would do with fewer cards."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from flux_ray.config.tier import Parallel
from flux_ray.planner.activations import largest_demand
from flux_ray.planner.candidate import Candidate

# A group stays in one node. klein is always one card: its replicas scale better than its ranks.
TENSOR_DEGREES = (1, 2, 4, 8)
SINGLE_CARD_FAMILIES = {"flux2-klein"}
# Without NVLink more tensor ranks than these wait longer than they compute.
MAX_TENSOR_OVER_PCIE = 2
FP8 = {"quantization": "fp8", "encoder_quantization": "fp8"}
NF4 = {"quantization": "nf4", "encoder_quantization": "nf4"}
SHARED = {"text_encoder": "shared"}
# What an operator may change to need fewer cards: named, never chosen, mildest first.
CHANGES: tuple[dict[str, str], ...] = (SHARED, FP8, FP8 | SHARED, NF4, NF4 | SHARED)


@dataclass(frozen=True)
class PlacementOption:
    """How one replica may be placed: what differs from the config, its GPUs and bytes on each.

    `encoder_bytes` are those of one more card for all replicas, where they share a text encoder.
    """

    changes: dict[str, str]
    tensor: int
    sequence: int
    rank_bytes: int
    encoder_bytes: int | None
    is_slow: bool = False


def cheapest(candidate: Candidate, count: int) -> PlacementOption | None:
    """The fewest tensor ranks that fit, in the precision that the config says."""
    return next(fitting(candidate, count, {}), None)


def alternatives(candidate: Candidate, count: int) -> tuple[PlacementOption, ...]:
    """Changes with which fewer ranks would do than without."""
    chosen = cheapest(candidate, count)
    found = list(slower(candidate, count)) if chosen is None else []
    fewest: dict[str, int] = {}
    for changes in CHANGES:
        layout = next(fitting(candidate, count, changes), None)
        if layout is None or (chosen is not None and layout.tensor >= chosen.tensor):
            continue
        place = changes.get("text_encoder", candidate.args.text_encoder)
        if layout.tensor < fewest.get(place, layout.tensor + 1):
            fewest[place] = layout.tensor
            found.append(layout)
    return tuple(found)


def fastest(candidate: Candidate, count: int, tensor: int) -> PlacementOption | None:
    """The most sequence ranks on top of the tensor ranks: more latency than more of those buy."""
    if candidate.tier.family in SINGLE_CARD_FAMILIES:
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
    """The layouts that fit, fewest ranks first."""
    assert candidate.card is not None
    for tensor in degrees(candidate, count, changes):
        if not candidate.card.has_nvlink and tensor > MAX_TENSOR_OVER_PCIE:
            return
        layout = layout_of(candidate, changes, Parallel(tensor=tensor))
        if layout is not None:
            yield layout


def slower(candidate: Candidate, count: int) -> Iterator[PlacementOption]:
    """A layout that fits only with more tensor ranks than the cards' links are good for."""
    for tensor in degrees(candidate, count, {}):
        if tensor > MAX_TENSOR_OVER_PCIE:
            layout = layout_of(candidate, {}, Parallel(tensor=tensor))
            if layout is not None:
                yield replace(layout, is_slow=True)
                return


def degrees(candidate: Candidate, count: int, changes: dict[str, str]) -> Iterator[int]:
    """The tensor degrees for which there are cards."""
    num_free = num_for_ranks(candidate, count, changes)
    is_single = candidate.tier.family in SINGLE_CARD_FAMILIES
    for tensor in TENSOR_DEGREES[:1] if is_single else TENSOR_DEGREES:
        if tensor <= num_free:
            yield tensor


def num_for_ranks(candidate: Candidate, count: int, changes: dict[str, str]) -> int:
    """All cards but one for a text encoder that is shared."""
    place = changes.get("text_encoder", candidate.args.text_encoder)
    return count - (place == "shared")


def layout_of(
    candidate: Candidate, changes: dict[str, str], parallel: Parallel
) -> PlacementOption | None:
    """The layout if it is possible and every card holds what it has to at the largest request."""
    assert candidate.card is not None, "a processor's memory is not planned"
    update: dict[str, Any] = {**changes, "parallel": parallel}
    tried = replace(candidate, args=candidate.args.model_copy(update=update))
    try:
        rank_bytes = tried.rank(largest_demand(candidate.tier)).total
    except ValueError:
        # Heads that cannot be cut, or a precision that cannot be split.
        return None
    is_shared = tried.args.text_encoder == "shared"
    encoder_bytes = tried.shared_encoder().total if is_shared else None
    if max(rank_bytes, encoder_bytes or 0) > candidate.card.usable_bytes:
        return None
    return PlacementOption(changes, parallel.tensor, parallel.sequence, rank_bytes, encoder_bytes)
