"""A tier of the catalogue and its family agree."""

import pytest

from flux_ray.catalog.tiers import TIERS, Tier
from flux_ray.engine.registry import FAMILIES, family_of


def offered(tier: Tier) -> set[str]:
    """The fields of a request that the tier's row lets change the image."""
    rows = {
        "references": tier.max_references > 0 and not tier.masks_only,
        "mask": tier.takes_mask,
        "guidance": tier.is_guided,
        "negative_prompt": tier.takes_negative,
        "true_cfg_scale": tier.takes_negative or tier.true_cfg_scale > 1,
        "strength": tier.takes_strength,
        "control_image": tier.takes_control,
    }
    return {name for name, is_offered in rows.items() if is_offered}


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_a_tier_offers_what_its_family_heeds(tier: Tier) -> None:
    assert offered(tier) <= family_of(tier).heeds


def test_every_family_is_that_of_a_tier() -> None:
    assert {tier.family for tier in TIERS} == FAMILIES.keys()
