"""What /v1/models says of a tier is what its row in the catalogue says."""

import pytest

from flux_ray.catalog import TIERS, Tier, tier_for
from flux_ray.config import GatewayArgs
from flux_ray.gateway.model_names import target_for
from flux_ray.gateway.models import Model, Models


def shown(name: str) -> Model:
    args = GatewayArgs(tiers=(name,))
    return Models(args, lambda _: True).model_for(target_for(name, args))


SAME = (
    "takes_negative",
    "takes_mask",
    "requires_mask",
    "masks_only",
    "takes_strength",
    "takes_control",
    "max_references",
    "max_side",
    "max_pixels",
)


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_a_model_is_shown_as_its_row_is(tier: Tier) -> None:
    model = shown(tier.name)
    assert {name: getattr(model, name) for name in SAME} == {
        name: getattr(tier, name) for name in SAME
    }
    assert (model.default_steps, model.default_guidance) == (tier.num_steps, tier.guidance)
    assert model.default_true_cfg_scale == tier.true_cfg_scale
    assert model.license == tier.license


def test_models_differ_in_what_they_take_and_need() -> None:
    assert shown("flux-1-dev").takes_negative and not shown("flux-2-dev").takes_negative
    assert shown("flux-1-fill-dev").requires_mask and not shown("flux-2-klein-4b").requires_mask
    assert shown("flux-1-canny-dev").takes_control and not shown("flux-1-dev").takes_control
    assert shown("flux-2-klein-9b-base").default_true_cfg_scale == 4
    assert tier_for("flux-1-schnell").guidance == shown("flux-1-schnell").default_guidance == 0
