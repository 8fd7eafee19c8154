"""Prompts encoded apart from the model that draws them: the same bits, across a process border."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux_ray.catalog.tiers import Tier, tier_for
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.encoding_cache import CachedEncoder
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.packing import pack, unpack
from flux_ray.engine.registry import load_adapter, load_prompt_encoder
from flux_ray.request import ImageRequest
from flux_ray.tiny import KLEIN_CHECKPOINT
from tests.engine.generation import finish, reference
from tests.engine.kleins import KLEINS, negative_of

PROMPT = "a red circle on a blue background"
TINY = tier_for("tiny")
LAPTOP = Placement("float32", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_crosses_a_process_border_bit_for_bit(
    klein_adapter: Flux2, dtype: torch.dtype
) -> None:
    prompt = klein_adapter.encode_prompt(PROMPT + " and so on" * 20)
    tensors = {**prompt.tensors, "embeds": prompt.tensors["embeds"].to(dtype)}
    packed = pack(replace(prompt, tensors=tensors))
    assert packed.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    arrived = unpack(packed, "cpu")
    assert arrived.tensors["embeds"].dtype == dtype
    assert arrived.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(arrived.tensors[name], tensor)
    assert arrived.warnings == prompt.warnings != ()


@pytest.mark.parametrize("tier", KLEINS.values(), ids=KLEINS)
def test_a_shared_encoder_leads_to_the_same_image(
    klein_adapter: Flux2, kleins: dict[str, Path], tier: Tier
) -> None:
    weights = str(kleins[tier.family])
    encoder = load_prompt_encoder(tier, weights, LAPTOP)
    generator = load_adapter(tier, weights, replace(LAPTOP, text_encoder="shared"))
    assert isinstance(generator, Flux2)
    assert generator.prompts is None
    negative = negative_of(tier)
    asked = ImageRequest(
        *("id", tier.name, PROMPT, 64, 64, 2, 1.0, 1),
        references=(reference(64, 64, 1),),
        negative_prompt=negative,
    )
    canvas = ImageSpec(64, 64, 2, true_cfg_scale=tier.true_cfg_scale)
    images = []
    for encode in (klein_adapter.encode_prompt, encoder.encode_prompt):
        prompts = tuple(pack(encode(words)) for words in asked.prompts)
        given, _ = CachedEncoder(generator, 0, "cpu").encode(asked, prompts)
        assert (given.negative is None) == (negative is None)
        state = generator.prepare(given, canvas, seed=1)
        images.append(generator.decode(finish(generator, state)))
    assert images[0] == images[1]


def test_an_encoder_alone_refuses_another_familys_weights(small_dev: Path) -> None:
    with pytest.raises(ValueError, match="for Flux2Pipeline, not Flux2KleinPipeline"):
        load_prompt_encoder(TINY, str(small_dev), LAPTOP)
    with pytest.raises(ValueError, match="for Flux2KleinPipeline, not Flux2Pipeline"):
        load_prompt_encoder(tier_for("flux-2-dev"), str(KLEIN_CHECKPOINT), LAPTOP)
    with pytest.raises(ValueError, match="tier flux-2-dev needs weights"):
        load_prompt_encoder(tier_for("flux-2-dev"), None, LAPTOP)
