"""The real models as data: their sizes are the published ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from flux_ray.engine.flux1.empty_model import PUBLISHED, empty_model
from flux_ray.parallel.checkpoint import shards_for
from flux_ray.parallel.load import saved_tensors
from tests.engine.flux1.conftest import SmallModel, tier_of

HUB = "owner/name@revision"
NUM_PARAMETERS = {
    "flux-1-dev": 11_901_408_320,
    "flux-1-schnell": 11_891_178_560,
    "flux-1-kontext-dev": 11_901_408_320,
    "flux-1-fill-dev": 11_902_391_360,
    "flux-1-depth-dev": 11_901_604_928,
    "flux-1-canny-dev": 11_901_604_928,
}


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_the_published_models_have_their_size(name: str) -> None:
    tier = replace(tier_of("dev"), name=name)
    model = empty_model(tier, HUB)
    assert num_parameters(model.transformer) == NUM_PARAMETERS[name]
    assert num_parameters(model.text_encoder) == 4_762_310_656
    assert num_parameters(model.whole_text_encoder) == 123_060_480
    assert num_parameters(model.vae) == 83_819_683
    assert model.is_published(tier) and model.source == "the published shapes"
    assert not model.is_published(replace(tier, name="another"))
    other = "flux-1-schnell" if name != "flux-1-schnell" else "flux-1-dev"
    assert not model.is_published(replace(tier, name=other))
    assert model.num_tokens(1024 * 1024) == 4096


def test_a_quarter_of_the_transformer_is_whole_on_every_rank() -> None:
    model = empty_model(replace(tier_of("dev"), name="flux-1-dev"), HUB).transformer
    shards = shards_for(model, model._tp_plan, 2)
    sizes = {name: tensor.numel() for name, tensor in saved_tensors(model)}
    assert sum(sizes[name] for name in shards) == 8_608_346_112
    assert sum(sizes.values()) - sum(sizes[name] for name in shards) == 3_293_062_208


def test_pro_is_planned_as_dev() -> None:
    assert PUBLISHED["flux-1-pro"] == PUBLISHED["flux-1-krea-dev"] == PUBLISHED["flux-1-dev"]


@pytest.mark.parametrize("kind", ["dev", "schnell", "fill"])
def test_a_folder_brings_its_own_shapes(flux1: Callable[[str], SmallModel], kind: str) -> None:
    model = flux1(kind)
    empty = empty_model(model.tier, str(model.folder))
    assert empty.source == str(model.folder) and not empty.is_published(model.tier)
    adapter = model.adapter
    assert adapter.prompts is not None
    for made, loaded in (
        (empty.transformer, adapter.pipeline.transformer),
        (empty.vae, adapter.vae),
        (empty.text_encoder, adapter.prompts.t5),
        (empty.whole_text_encoder, adapter.prompts.clip),
    ):
        shapes = {name: tensor.shape for name, tensor in saved_tensors(loaded)}
        assert {name: tensor.shape for name, tensor in saved_tensors(made)} == shapes


def test_what_is_neither_here_nor_published_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder here"):
        empty_model(tier_of("fill"), str(tmp_path / "absent"))
