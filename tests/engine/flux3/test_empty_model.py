"""The published models as data: their sizes, what a card holds of them, and what is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.engine.api import Placement
from flux_ray.engine.flux3.pipeline import Flux3
from flux_ray.engine.registry import empty_model
from flux_ray.parallel.load import saved_tensors
from flux_ray.parallel.precision import held_parts
from flux_ray.planner.plan import TierPlan, make_plan

KLEIN, BASE = "flux-3-klein", "flux-3-klein-base"
HUB = "owner/name@revision"


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "transformer"), [(KLEIN, 5_548_681_984), (BASE, 5_538_458_368)])
def test_the_published_models_have_the_published_number_of_parameters(
    name: str, transformer: int
) -> None:
    model = empty_model(tier_for(name), HUB)
    assert num_parameters(model.transformer) == transformer
    assert num_parameters(model.vae) == 84_046_115
    # Qwen3-VL-4B's embedding, and of its 36 layers the first 32.
    layer = 2560 * 128 * (32 + 2 * 8 + 32) + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert num_parameters(model.text_encoder) == 151_936 * 2560 + 32 * layer
    assert model.is_published(tier_for(name))
    for module in (model.transformer, model.text_encoder, model.vae):
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_a_folder_is_planned_by_its_own_configs(small_flux3: Callable[[str], Path]) -> None:
    model = empty_model(tier_for(KLEIN), str(small_flux3(KLEIN)))
    assert model.source == str(small_flux3(KLEIN))
    assert num_parameters(model.transformer) < 1_000_000
    assert not model.is_published(tier_for(KLEIN))
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        empty_model(tier_for(KLEIN), "FLUX.3")


def planned(card: str = "rtx4090-24gb", **args: object) -> TierPlan:
    settings = {"tier": KLEIN, "weights": HUB, "cache_bytes": 0} | args
    [tier] = make_plan([TierArgs(**settings)], card, 4).tiers
    return tier


# The linears of all blocks (three kinds of 5 blocks, and 28 joint ones), each with query, key,
# value, output and an MLP of a gated 9216; the norms of queries and keys, kept in fp32; the rest.
NUM_BLOCKS, WIDTH, INNER = 3 * 5 + 28, 3072, 9216
NUM_IN_BLOCKS = NUM_BLOCKS * (4 * WIDTH**2 + 3 * WIDTH * INNER)
NUM_NORMS = NUM_BLOCKS * 2 * 128
NUM_WHOLE = 5_548_681_984 - NUM_IN_BLOCKS - NUM_NORMS
# FP8 has a scale of four bytes for each row.
NUM_SHARED_ROWS, NUM_WHOLE_ROWS = NUM_BLOCKS * (3 * WIDTH + 2 * INNER), NUM_BLOCKS * 2 * WIDTH


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_a_card_holds_what_is_counted_by_hand_to_the_byte(
    tensor: int, quantization: str | None
) -> None:
    plan = planned(parallel=Parallel(tensor=tensor), quantization=quantization)
    blocks = 2 * NUM_IN_BLOCKS // tensor
    if quantization is not None:
        blocks = NUM_IN_BLOCKS // tensor + 4 * (NUM_SHARED_ROWS // tensor + NUM_WHOLE_ROWS)
    assert plan.cards[0].bytes.transformer == blocks + 2 * NUM_WHOLE + 4 * NUM_NORMS


def test_klein_is_planned_on_24_gb() -> None:
    """In bf16 for an image of a megapixel; with ten references only without its text encoder."""
    plan = planned()
    assert plan.cards[0].fits_default and not plan.cards[0].fits
    assert plan.alternatives[0].changes == {"text_encoder": "shared"}
    assert plan.fastest is None, "more replicas are better than more ranks"
    small = planned(quantization="int8", encoder_quantization="int8")
    assert small.cards[0].fits


def test_sequence_ranks_are_refused_in_a_plan_too() -> None:
    with pytest.raises(ValueError, match=r"tier flux-3-klein cannot split its tokens over"):
        planned(parallel=Parallel(sequence=2))


@pytest.mark.parametrize("quantization", [None, "fp8", "int8"])
def test_what_is_loaded_has_the_bytes_that_were_planned(
    small_flux3: Callable[[str], Path], quantization: str | None
) -> None:
    folder = str(small_flux3(KLEIN))
    both = {"quantization": quantization, "encoder_quantization": quantization}
    plan = planned(weights=folder, **both)
    adapter = Flux3.load(folder, Placement("bfloat16", "cpu", **both), tier_for(KLEIN))
    modules = (adapter.transformer, adapter.prompts.text_encoder, adapter.vae)
    loaded = [
        sum(part.nbytes for _, tensor in saved_tensors(each) for part in held_parts(tensor))
        for each in modules
    ]
    held = plan.cards[0].bytes
    assert loaded == [held.transformer, held.text_encoder, held.vae]
