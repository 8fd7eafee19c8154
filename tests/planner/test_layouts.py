"""Which layout of a tier is the cheapest that fits, what would do with fewer cards, what is fast.

Bytes are GB a card at the largest request: four megapixels with all references.
"""

from functools import cache

import pytest

from flux_ray.catalog.gpus import card_for
from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import TierArgs
from flux_ray.engine.flux2.empty_model import EmptyFlux2, empty_model
from flux_ray.planner.candidate import Candidate
from flux_ray.planner.plan import PlacementOption, alternatives, cheapest, fastest

GB = 10**9
HUB = "owner/name@revision"
FP8 = {"quantization": "fp8", "encoder_quantization": "fp8"}
NF4 = {"quantization": "nf4", "encoder_quantization": "nf4"}
SHARED = {"text_encoder": "shared"}
# What was counted by hand was counted without.
NO_CACHE = {"cache_bytes": 0}


@cache
def model_of(name: str) -> EmptyFlux2:
    return empty_model(tier_for(name), HUB)


def candidate(name: str, card: str = "h100-80gb", **args: str) -> Candidate:
    tier_args = TierArgs(tier=name, weights=HUB, **NO_CACHE | args)
    return Candidate(model_of(name), tier_for(name), tier_args, card_for(card))


def tensor_of(layout: PlacementOption | None) -> int | None:
    return None if layout is None else layout.tensor


def summary(layouts: tuple[PlacementOption, ...]) -> list[tuple[dict[str, str], int, float]]:
    """Of each: what the operator would change, its tensor ranks, GB on each card."""
    return [(one.changes, one.tensor, round(one.rank_bytes / GB, 1)) for one in layouts]


@pytest.mark.parametrize(
    ("card", "args", "tensor"),
    [
        ("b200-180gb", {}, 1),
        ("h200-141gb", {}, 1),
        ("h100-80gb", {}, 2),
        ("a100-40gb", {}, 4),
        ("h100-80gb", FP8, 1),
        ("a100-40gb", FP8, 2),
        ("h100-80gb", SHARED, 1),
        # Two ranks are all that cards without NVLink are good for.
        ("l40s-48gb", {}, None),
        ("l40s-48gb", FP8, 2),
        ("rtx4090-24gb", FP8, None),
    ],
)
def test_the_cheapest_dev_has_the_fewest_ranks_that_fit(
    card: str, args: dict, tensor: int | None
) -> None:
    assert tensor_of(cheapest(candidate("flux-2-dev", card, **args), 8)) == tensor


def test_the_cheapest_layout_changes_nothing_that_the_config_says() -> None:
    layout = cheapest(candidate("flux-2-dev"), 8)
    assert (layout.changes, layout.sequence, layout.is_slow) == ({}, 1, False)
    assert layout.rank_bytes / GB == pytest.approx(59.12, abs=0.01)
    assert layout.encoder_bytes is None


@pytest.mark.parametrize(("card", "tensor"), [("h100-80gb", 1), ("rtx4090-24gb", None)])
def test_klein_is_always_on_one_card(card: str, tensor: int | None) -> None:
    """Two cards of 24 GB would hold klein 9B split, and are not asked to."""
    assert tensor_of(cheapest(candidate("flux-2-klein-9b", card), 8)) == tensor


@pytest.mark.parametrize(("count", "tensor"), [(1, None), (2, 2), (8, 2)])
def test_a_layout_takes_no_more_cards_than_there_are(count: int, tensor: int | None) -> None:
    assert tensor_of(cheapest(candidate("flux-2-dev"), count)) == tensor


@pytest.mark.parametrize(("count", "tensor"), [(1, None), (2, 1)])
def test_a_shared_encoder_takes_one_of_the_cards(count: int, tensor: int | None) -> None:
    layout = cheapest(candidate("flux-2-dev", **SHARED), count)
    assert tensor_of(layout) == tensor
    if layout is not None:
        assert layout.rank_bytes / GB == pytest.approx(76.39, abs=0.01)
        assert layout.encoder_bytes / GB == pytest.approx(35.76, abs=0.01)


def test_alternatives_do_with_fewer_ranks_the_mildest_of_each_kind_first() -> None:
    """Not in 4 bits: FP8 is as small as it gets, and milder."""
    found = alternatives(candidate("flux-2-dev"), 8)
    assert summary(found) == [(SHARED, 1, 76.4), (FP8, 1, 76.3)]
    assert [layout.encoder_bytes is None for layout in found] == [False, True]


def test_each_step_of_precision_is_named_where_it_saves_ranks() -> None:
    found = alternatives(candidate("flux-2-dev", "a100-40gb"), 8)
    assert summary(found) == [(SHARED, 2, 41.1), (FP8, 2, 36.8), (NF4 | SHARED, 1, 31.9)]


@pytest.mark.parametrize(
    ("name", "card"), [("flux-2-dev", "b200-180gb"), ("flux-2-klein-4b", "l4-24gb")]
)
def test_one_card_has_no_alternatives(name: str, card: str) -> None:
    assert tensor_of(cheapest(candidate(name, card), 8)) == 1
    assert alternatives(candidate(name, card), 8) == ()


def test_alternatives_take_no_more_cards_than_there_are() -> None:
    """The text encoder would need a second one."""
    assert summary(alternatives(candidate("flux-2-dev"), 1)) == [(FP8, 1, 76.3)]


def test_a_config_that_already_shares_the_encoder_is_offered_precision_alone() -> None:
    shared = candidate("flux-2-klein-4b", "rtx4060-8gb", **SHARED)
    assert cheapest(shared, 2) is None
    assert summary(alternatives(shared, 2)) == [(NF4, 1, 8.1)]


def test_without_nvlink_more_ranks_are_named_as_slow_before_the_alternatives() -> None:
    slow, *others = alternatives(candidate("flux-2-dev", "l40s-48gb"), 8)
    assert (slow.changes, slow.tensor, slow.is_slow) == ({}, 4, True)
    assert [layout.is_slow for layout in others] == [False] * 4
    assert summary(tuple(others))[:2] == [(SHARED, 2, 41.1), (FP8, 2, 41.7)]


def test_with_nvlink_nothing_is_slow() -> None:
    found = alternatives(candidate("flux-2-dev", "a100-40gb"), 2)
    assert found
    assert not any(layout.is_slow for layout in found)


@pytest.mark.parametrize("count", [1, 2])
def test_klein_4b_on_8_gb_fits_only_in_four_bits_with_its_encoder_on_another_card(
    count: int,
) -> None:
    small = candidate("flux-2-klein-4b", "rtx4060-8gb")
    assert cheapest(small, count) is None
    found = alternatives(small, count)
    assert summary(found) == ([] if count == 1 else [(NF4 | SHARED, 1, 8.1)])


@pytest.mark.parametrize(
    ("count", "tensor", "sequence"),
    [(8, 2, 4), (16, 2, 4), (4, 2, 2), (7, 2, 2), (3, 2, None), (8, 4, 2), (8, 8, None)],
)
def test_the_fastest_layout_fills_a_node_with_sequence_ranks(
    count: int, tensor: int, sequence: int | None
) -> None:
    layout = fastest(candidate("flux-2-dev"), count, tensor)
    assert (None if layout is None else layout.sequence) == sequence
    if layout is not None:
        assert layout.tensor == tensor


def test_sequence_ranks_hold_less_each() -> None:
    """Their share of the text encoder and of the activations."""
    layout = fastest(candidate("flux-2-dev"), 8, 2)
    assert layout.rank_bytes / GB == pytest.approx(44.49, abs=0.01)


def test_klein_has_no_faster_layout_than_one_card() -> None:
    assert fastest(candidate("flux-2-klein-9b"), 8, 1) is None


@pytest.mark.parametrize(
    ("count", "sequence"),
    [
        (2, None),
        (3, 2),
        (5, 4),
        (8, 4),
        (9, 8),
    ],
)
def test_the_fastest_layout_leaves_a_card_to_a_shared_encoder(
    count: int, sequence: int | None
) -> None:
    layout = fastest(candidate("flux-2-dev", **SHARED), count, 1)
    assert (None if layout is None else layout.sequence) == sequence
