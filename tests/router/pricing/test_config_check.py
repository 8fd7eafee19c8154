"""Keys of a gateway's config that ask the impossible are named before anything starts."""

from dataclasses import replace

import pytest

from flux_ray.app import build_gateway
from flux_ray.catalog.tiers import tier_for
from flux_ray.config.gateway import GatewayArgs
from flux_ray.router.pricing.config_check import check_possible
from flux_ray.router.pricing.cost import ReplicaSpec, price, work_at

TIERS = ("flux-2-dev", "flux-2-klein-4b")
KEYS_FILE = {"keys_file": "keys.yaml"}


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"deadlines": {"flux-2-dev": 0.5}}, r"deadlines\.flux-2-dev: 0\.5 s is impossible"),
        (
            KEYS_FILE | {"key_classes": {"hasty": {"deadline_s": 0.01}}},
            r"key_classes\.hasty\.deadline_s: 0\.01 s is impossible",
        ),
        (
            KEYS_FILE | {"key_classes": {"x": {"licenses": ["mit"]}}},
            r"key_classes\.x\.licenses: none of its tiers",
        ),
        (
            {"aliases": {"thrifty": {"tiers": ["flux-2-dev"], "max_gpu_seconds": 0.5}}},
            r"aliases\.thrifty\.max_gpu_seconds: 0\.5 is impossible",
        ),
    ],
)
def test_the_impossible_is_named(args, key):
    with pytest.raises(ValueError, match=key):
        check_possible(GatewayArgs.model_validate({"tiers": TIERS} | args))


def test_it_is_refused_when_the_application_is_built():
    with pytest.raises(ValueError, match="deadlines"):
        build_gateway(GatewayArgs(tiers=TIERS, deadlines={"flux-2-dev": 0.5}))


def test_what_one_of_the_tiers_can_do_is_possible():
    """A class's deadline is for klein, where dev cannot make it."""
    check_possible(
        GatewayArgs.model_validate(
            {
                "tiers": TIERS,
                "keys_file": "keys.yaml",
                "deadlines": {"flux-2-dev": 20},
                "key_classes": {"hasty": {"deadline_s": 1.0}},
                "aliases": {"thrifty": {"tiers": TIERS, "max_gpu_seconds": 1.0}},
            }
        )
    )


def test_an_image_of_a_short_prompt_is_possible_where_one_of_the_longest_is_not():
    """On FLUX.3 the longest takes twice as many seconds."""
    tier, limit = "flux-3-klein-base", 7.0
    row, card = tier_for(tier), GatewayArgs.model_fields["card"].default
    longest = work_at(tier, row.default_side, row.default_side, row.num_steps)
    assert price(longest, ReplicaSpec(card)).total_s / 2 > limit
    assert price(replace(longest, num_text=80), ReplicaSpec(card)).total_s < limit
    alias = {"thrifty": {"tiers": [tier], "max_gpu_seconds": limit}}
    check_possible(GatewayArgs.model_validate({"tiers": [tier], "aliases": alias}))
