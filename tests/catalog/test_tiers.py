"""The rows of the catalogue are complete and agree with themselves."""

import pytest

from flux_ray.catalog.tiers import TIERS, tier_for
from flux_ray.errors import UnknownTier


def test_names_are_unique():
    assert len({tier.name for tier in TIERS}) == len(TIERS)


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_defaults_lie_within_limits(tier):
    assert tier_for(tier.name) is tier
    assert tier.min_side <= tier.default_side <= tier.max_side
    assert tier.default_side**2 <= tier.max_pixels <= tier.max_side**2
    assert 1 <= tier.num_steps <= tier.max_steps
    assert tier.max_references >= tier.takes_mask, "a mask is of a reference"
    for side in (tier.min_side, tier.default_side, tier.max_side):
        assert side % tier.size_multiple == 0


def test_an_unknown_tier_names_the_known_ones():
    with pytest.raises(UnknownTier, match="tiny") as caught:
        tier_for("flux-9")
    assert caught.value.field == "model"


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_qualities_are_steps_of_what_is_not_distilled(tier):
    assert bool(tier.quality_steps) == tier.is_guided
    assert tier.steps_at(None) is None and tier.steps_at("auto") is None
    ladder = [tier.steps_at(word) for word in ("low", "medium", "high", "xhigh", "max")]
    if tier.is_guided:
        assert ladder == sorted(ladder) and ladder[0] >= 1 and ladder[-1] <= tier.max_steps
        assert tier.steps_at("low") < tier.num_steps <= tier.steps_at("high")
