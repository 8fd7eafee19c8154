"""How long a replica may take to end: as long as the tier's longest request, and no longer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ray.catalog.tiers import TIERS
from flux_ray.config.gateway import Limits
from flux_ray.config.tier import TierArgs
from flux_ray.router.pricing.config_check import MAX_S, MIN_S, drain_timeout_s, longest_work
from flux_ray.router.pricing.cost import ReplicaSpec, price, work_at

NAMES = [tier.name for tier in TIERS]


def args_of(tier: str, **args: object) -> TierArgs:
    return TierArgs.model_validate({"tier": tier, "weights": "x/y@z", **args})


@pytest.mark.parametrize("tier", NAMES)
def test_it_is_longer_than_the_longest_request_unless_gateways_give_that_up(tier: str) -> None:
    longest_s = price(longest_work(tier), ReplicaSpec("h100-80gb")).total_s
    drain_s = drain_timeout_s(args_of(tier))
    assert MIN_S <= drain_s <= MAX_S
    assert drain_s > longest_s or drain_s == MAX_S


def test_a_notice_of_a_minute_is_enough_for_one_card_of_klein_and_for_the_embedded_tier() -> None:
    assert drain_timeout_s(args_of("flux-2-klein-4b")) <= 60
    assert drain_timeout_s(args_of("tiny", device="cpu", dtype="float32")) == MIN_S
    assert drain_timeout_s(args_of("flux-2-dev", parallel={"tensor": 2})) == MAX_S


def test_it_is_shorter_where_more_cards_share_the_work() -> None:
    alone = drain_timeout_s(args_of("flux-2-klein-9b"))
    assert drain_timeout_s(args_of("flux-2-klein-9b", parallel={"tensor": 2})) < alone


def test_what_the_file_says_counts() -> None:
    for said_s in (1.0, 3600.0):
        assert drain_timeout_s(args_of("flux-2-klein-4b", drain_timeout_s=said_s)) == said_s


@given(
    tier=st.sampled_from(TIERS),
    share=st.floats(0.01, 1),
    num_images=st.integers(1, Limits().max_images),
    references=st.integers(0, 8),
)
def test_no_request_of_the_tiers_own_steps_takes_longer(
    tier, share: float, num_images: int, references: int
) -> None:
    side = max(tier.min_side, int((tier.max_pixels * share) ** 0.5))
    num_references = min(references, tier.max_references)
    work = work_at(tier.name, side, side, tier.num_steps, num_references, num_images)
    layout = ReplicaSpec("h100-80gb")
    assert price(work, layout).total_s <= price(longest_work(tier.name), layout).total_s


def test_the_longest_request_steers_away_from_a_prompt_where_that_may_be_sent() -> None:
    assert longest_work("flux-1-dev").num_forwards == 2
    assert longest_work("flux-1-fill-dev").num_forwards == 1
    assert longest_work("flux-2-klein-4b-base").num_forwards == 2
