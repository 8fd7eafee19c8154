"""Prompts encoded apart from the model that draws them: the same bits, across a process border."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux_ray.catalog.tiers import tier_for
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.packing import pack, unpack
from flux_ray.engine.registry import load_prompt_encoder
from flux_ray.tiny import CHECKPOINT
from tests.engine.generation import finish

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


def test_a_shared_encoder_leads_to_the_same_image(klein_adapter: Flux2) -> None:
    encoder = load_prompt_encoder(TINY, None, LAPTOP)
    generator = Flux2.load("embedded", Placement("float32", "cpu", text_encoder="shared"), TINY)
    assert generator.prompts is None
    images = []
    for prompt in (
        klein_adapter.encode_prompt(PROMPT),
        unpack(pack(encoder.encode_prompt(PROMPT)), "cpu"),
    ):
        state = generator.prepare(generator.encode(prompt, ()), ImageSpec(64, 64, 2), seed=1)
        images.append(generator.decode(finish(generator, state)))
    assert images[0] == images[1]


def test_an_encoder_alone_refuses_another_familys_weights(small_dev: Path) -> None:
    with pytest.raises(ValueError, match="for Flux2Pipeline, not Flux2KleinPipeline"):
        load_prompt_encoder(TINY, str(small_dev), LAPTOP)
    with pytest.raises(ValueError, match="for Flux2KleinPipeline, not Flux2Pipeline"):
        load_prompt_encoder(tier_for("flux-2-dev"), str(CHECKPOINT), LAPTOP)
    with pytest.raises(ValueError, match="tier flux-2-dev needs weights"):
        load_prompt_encoder(tier_for("flux-2-dev"), None, LAPTOP)
