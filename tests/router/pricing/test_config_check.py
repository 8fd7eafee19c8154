"""Keys of a gateway's config that ask the impossible are named before anything starts."""

import pytest

from flux_ray.app import build_gateway
from flux_ray.config.gateway import GatewayArgs
from flux_ray.router.pricing.config_check import check_possible

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
