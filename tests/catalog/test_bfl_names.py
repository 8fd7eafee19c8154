"""BFL's model names stand for tiers of the catalogue, and only for those that are served."""

from flux_ray.catalog import TIERS, stand_ins_for, tier_for
from flux_ray.catalog.bfl_names import STAND_INS


def test_every_stand_in_is_a_tier_and_no_name_is():
    names = {tier.name for tier in TIERS}
    assert {tier for stand_ins in STAND_INS.values() for tier in stand_ins} <= names
    assert not names & STAND_INS.keys()


def test_a_stand_in_does_the_same_work():
    for name, work in (("fill", "requires_mask"), ("depth", "takes_control")):
        for tier in STAND_INS[f"flux-pro-1.0-{name}"]:
            assert getattr(tier_for(tier), work)
    assert all(tier_for(tier).max_references for tier in STAND_INS["flux-kontext-pro"])


def test_only_what_is_served_stands_for_a_name():
    assert stand_ins_for(["tiny", "flux-2-klein-4b"]) == {}
    found = stand_ins_for(["flux-1-dev", "flux-1-fill-dev"])
    assert found.keys() == {
        "flux-dev",
        "flux-pro",
        "flux-pro-1.1",
        "flux-pro-1.1-ultra",
        "flux-pro-1.0-fill",
    }
    assert found["flux-pro-1.1"] == ("flux-1-dev",)
    assert stand_ins_for(["flux-1-dev", "flux-1-pro"])["flux-pro"] == ("flux-1-pro", "flux-1-dev")
