"""The rows of the catalogue are complete and agree with themselves."""

import re

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
    assert tier.takes_mask >= max(tier.requires_mask, tier.takes_strength)
    assert tier.true_cfg_scale >= 1
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


# It is public too, but which revision works was not seen.
UNPINNED = "flux-3-klein-base"


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_published_weights_are_pinned_to_a_commit(tier):
    """Whose weights are public, and every hub id once: two tiers cannot be the same model."""
    is_public = tier.license != "proprietary" and tier.weights is None
    assert bool(tier.hub_id) == (is_public and tier.name != UNPINNED)
    if tier.hub_id:
        pattern = r"black-forest-labs/(FLUX\.[12]-|flux-3-)[\w-]+@[0-9a-f]{40}"
        assert re.fullmatch(pattern, tier.hub_id)
        assert [each.name for each in TIERS if each.hub_id == tier.hub_id] == [tier.name]


@pytest.mark.parametrize(
    ("name", "license_name"),
    [
        ("flux-1-schnell", "apache-2.0"),
        ("flux-2-klein-4b-base", "apache-2.0"),
        ("flux-1-dev", "flux-non-commercial"),
        ("flux-1-fill-dev", "flux-non-commercial"),
        ("flux-2-klein-9b-base", "flux-non-commercial"),
        ("flux-2-klein-9b-kv", "flux-non-commercial"),
        ("flux-1-pro", "proprietary"),
        ("flux-3-klein", "flux-kommunity"),
        ("flux-3-klein-base", "flux-kommunity"),
    ],
)
def test_each_model_has_the_licence_of_its_publisher(name, license_name):
    assert tier_for(name).license == license_name


def test_a_tier_that_always_steers_has_its_scale_as_guidance():
    steering = [tier for tier in TIERS if tier.true_cfg_scale > 1]
    assert {tier.name for tier in steering} >= {"flux-2-klein-4b-base", "flux-2-klein-9b-base"}
    for tier in steering:
        assert tier.is_guided and tier.guidance == tier.true_cfg_scale


@pytest.mark.parametrize(
    ("name", "size", "added"),
    [
        ("flux-2-klein-4b", (100, 79), 96 * 64),
        ("flux-2-klein-4b", (4000, 3000), 1168 * 880),
        # Kontext scales a small reference up, and a large one down.
        ("flux-1-kontext-dev", (100, 79), 4150 * 256),
        ("flux-1-kontext-dev", (4000, 3000), 4150 * 256),
        ("flux-1-fill-dev", (1024, 1024), 0),
        ("flux-1-canny-dev", (1024, 1024), 0),
    ],
)
def test_how_many_pixels_a_reference_adds(name, size, added):
    assert tier_for(name).pixels_added_by(*size) == added


def test_kontexts_references_are_the_largest_of_its_own_sizes():
    """diffusers has the list; the catalogue does not load it."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    tokens = [width // 16 * (height // 16) for width, height in PREFERRED_KONTEXT_RESOLUTIONS]
    assert max(tokens) == tier_for("flux-1-kontext-dev").reference_tokens
    assert min(tokens) > 0.97 * max(tokens)
