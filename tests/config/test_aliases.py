"""Names that stand for tiers: what the config may say, and what it comes to."""

import pytest
from pydantic import ValidationError

from flux_ray.auth.keys import KeyClass
from flux_ray.config.gateway import GatewayArgs

TIERS = ["flux-2-klein-4b", "flux-2-dev", "flux-2-klein-9b"]


def args(**aliases) -> GatewayArgs:
    return GatewayArgs.model_validate({"tiers": TIERS, "aliases": aliases})


def test_a_tier_stands_for_itself_and_auto_for_all_best_first():
    assert args().alias_for("flux-2-dev").tiers == ("flux-2-dev",)
    assert args().alias_for("auto").tiers == ("flux-2-dev", "flux-2-klein-9b", "flux-2-klein-4b")
    assert args().alias_for("dall-e-3") is None


def test_an_alias_may_be_a_name_or_name_others():
    served = args(
        **{"gpt-image-1": "klein"},
        klein={"tiers": ["flux-2-klein-9b", "flux-2-klein-4b"], "policy": "spill"},
        all={"tiers": ["flux-2-dev", "klein", "flux-2-dev"], "max_gpu_seconds": 50},
        auto={"tiers": ["klein"], "policy": "spill"},
    )
    assert served.alias_for("gpt-image-1").tiers == ("flux-2-klein-9b", "flux-2-klein-4b")
    assert served.alias_for("gpt-image-1").policy == "best", "its own policy counts"
    every = served.alias_for("all")
    assert every.tiers == ("flux-2-dev", "flux-2-klein-9b", "flux-2-klein-4b")
    assert every.max_gpu_seconds == 50
    assert served.alias_for("auto").policy == "spill", "the operator's own"


def test_an_alias_may_be_the_default():
    named = {"tiers": TIERS, "aliases": {"mine": "flux-2-dev"}}
    for name in ("mine", "auto", "flux-2-dev"):
        assert GatewayArgs.model_validate(named | {"default_tier": name}).default_tier == name


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        ({"a": "flux-9"}, r"aliases\.a\.tiers: no tier and no alias 'flux-9'"),
        ({"a": "tiny"}, r"aliases\.a\.tiers: no tier and no alias 'tiny' is served here"),
        ({"a": "b", "b": "c", "c": "a"}, r"aliases\.a: a cycle: a -> b -> c -> a"),
        ({"a": {"tiers": ["flux-2-dev", "a"]}}, r"aliases\.a: a cycle: a -> a"),
        ({"flux-2-dev": "flux-2-klein-4b"}, r"aliases\.flux-2-dev: a tier has that name"),
        ({"a": {"tiers": []}}, r"aliases\.a\.tiers"),
        ({"a": {"tiers": ["flux-2-dev"], "policy": "cheapest"}}, r"aliases\.a\.policy"),
        ({"a": {"tiers": ["flux-2-dev"], "max_cost": 1}}, r"aliases\.a\.max_cost"),
        ({"a": {"tiers": ["flux-2-dev"], "max_gpu_seconds": 0}}, r"max_gpu_seconds"),
        ({"a": {"tiers": ["flux-2-dev"], "policy": "cascade"}}, r"at least two"),
        ({"a": {"tiers": ["b", "c"], "policy": "cascade"}, "b": "c", "c": "flux-2-dev"}, "cascade"),
        (
            {"a": {"tiers": TIERS, "policy": "cascade", "max_gpu_seconds": 1}},
            "max_gpu_seconds is for",
        ),
    ],
)
def test_what_makes_no_sense_is_named(aliases, message):
    with pytest.raises(ValidationError, match=message):
        args(**aliases)


KEYS = {"keys_file": "keys.yaml"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"deadlines": {"tiny": 3}}, r"deadlines\.tiny: tiny is not among tiers"),
        ({"deadlines": {"flux-2-dev": -3}}, r"deadlines\.flux-2-dev"),
        ({"key_classes": {"a": {"weight": 2}}}, "key_classes: nobody is in them"),
        (KEYS | {"key_classes": {"a": {"keys": ["0" * 64]}}}, r"key_classes\.a\.keys"),
        (KEYS | {"key_classes": {"a": {"max_concurrent": 0}}}, r"key_classes\.a\.max_concurrent"),
        (
            KEYS | {"key_classes": {"a": {"tiers": ["tiny"]}}},
            r"key_classes\.a\.tiers: tiny is not among tiers",
        ),
    ],
)
def test_deadlines_and_classes_are_checked(changed, message):
    with pytest.raises(ValidationError, match=message):
        GatewayArgs.model_validate({"tiers": TIERS} | changed)


def test_a_class_uses_its_tiers_of_its_licences():
    assert KeyClass().may_use("flux-2-dev")
    free = KeyClass(licenses=("apache-2.0", "proprietary"))
    assert free.may_use("flux-2-klein-4b")
    assert not free.may_use("flux-2-dev")
    named = KeyClass(tiers=("flux-2-dev",))
    assert named.may_use("flux-2-dev")
    assert not named.may_use("flux-2-klein-4b")
    assert not KeyClass(tiers=("flux-2-dev",), licenses=("apache-2.0",)).may_use("flux-2-dev")


FLUX_1 = ["flux-1-dev", "flux-1-kontext-dev", "flux-1-fill-dev", "flux-1-canny-dev"]


def test_bfls_names_are_aliases_only_where_the_operator_says_so():
    named = {"tiers": FLUX_1}
    assert GatewayArgs.model_validate(named).aliases == {}
    served = GatewayArgs.model_validate(named | {"bfl_names": True})
    assert served.alias_for("flux-dev").tiers == ("flux-1-dev",)
    assert served.alias_for("flux-pro-1.1").tiers == ("flux-1-dev",)
    assert served.alias_for("flux-kontext-pro").tiers == ("flux-1-kontext-dev",)
    assert served.alias_for("flux-pro-1.0-fill").tiers == ("flux-1-fill-dev",)
    assert served.alias_for("flux-pro-1.0-canny").tiers == ("flux-1-canny-dev",)
    assert served.alias_for("flux-pro-1.0-depth") is None, "no tier here does that"
    assert GatewayArgs.model_validate(served.model_dump()) == served


def test_the_operators_own_alias_comes_before_bfls():
    own = {"flux-pro-1.1": "flux-1-fill-dev", "mine": "flux-dev"}
    served = GatewayArgs.model_validate({"tiers": FLUX_1, "aliases": own, "bfl_names": True})
    assert served.alias_for("flux-pro-1.1").tiers == ("flux-1-fill-dev",)
    assert served.alias_for("mine").tiers == ("flux-1-dev",)
