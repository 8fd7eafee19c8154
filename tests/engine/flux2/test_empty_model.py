"""The real models as data: their sizes are the published ones."""

from pathlib import Path

import pytest

from flux_ray.catalog.tiers import TIERS, tier_for
from flux_ray.engine.flux2.empty_model import EmptyFlux2, empty_model
from flux_ray.parallel.load import saved_tensors

HUB = "owner/name@revision"


def num_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_nothing_of_a_model_is_in_memory() -> None:
    model = empty_model(tier_for("flux-2-dev"), HUB)
    for module in (model.transformer, model.text_encoder, model.vae):
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_every_tier_can_be_planned() -> None:
    for tier in TIERS:
        if tier.family.startswith("flux2"):
            assert isinstance(empty_model(tier, tier.weights or HUB), EmptyFlux2)


def test_a_folder_is_planned_by_its_own_configs(small_dev: Path) -> None:
    model = empty_model(tier_for("flux-2-dev"), str(small_dev))
    assert model.source == str(small_dev)
    assert num_parameters(model.transformer) < 1_000_000


def test_the_embedded_checkpoint_is_planned_by_its_own_configs() -> None:
    model = empty_model(tier_for("tiny"), None)
    assert model.transformer.config.num_attention_heads == 4
    assert len(list(saved_tensors(model.text_encoder))) > 0


def test_weights_on_the_nodes_are_planned_from_a_machine_that_has_none() -> None:
    model = empty_model(tier_for("flux-2-pro"), "/nowhere/flux-2-pro")
    assert model.source == "the published shapes"


@pytest.mark.parametrize("weights", ["FLUX.2-dev", "black-forest-labs/FLUX.2-dev", ""])
def test_weights_that_the_loader_would_refuse_are_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="weights"):
        empty_model(tier_for("flux-2-dev"), weights)


def test_a_checkpoint_without_a_published_shape_must_be_here() -> None:
    with pytest.raises(ValueError, match="/nowhere"):
        empty_model(tier_for("tiny"), "/nowhere")
