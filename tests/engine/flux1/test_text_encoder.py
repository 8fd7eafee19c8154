"""Prompts are encoded as FluxPipeline encodes them: in a replica or apart from it, or split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux_ray.config.tier import Parallel
from flux_ray.engine.api import Placement
from flux_ray.engine.flux1.text_encoder import Flux1PromptEncoder, load_prompt_encoder
from flux_ray.engine.packing import pack, unpack
from flux_ray.parallel.mesh import Mesh
from tests.engine.flux1.conftest import SmallModel, tier_of
from tests.ranks import Ranks

PROMPT = "a red circle on the blue background"
# More than CLIP's 77 tokens; a letter that the words of the tokenizer do not have is one.
LONG = PROMPT + ", with 99 stars: " + "very far away " * 8


@pytest.mark.parametrize("prompt", ["", PROMPT, LONG], ids=["empty", "short", "cut by CLIP"])
@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_equals_the_pipeline_bit_for_bit(
    flux1: Callable[[str], SmallModel], kind: str, prompt: str
) -> None:
    """Of 512 tokens, and of schnell's 256."""
    model = flux1(kind)
    made = model.adapter.encode_prompt(prompt)
    with torch.inference_mode():
        embeds, pooled, _ = model.pipeline.encode_prompt(
            prompt, max_sequence_length=model.tier.text_length
        )
    assert made.tensors["embeds"].shape[1] == model.tier.text_length
    assert torch.equal(made.tensors["embeds"], embeds)
    assert torch.equal(made.tensors["pooled"], pooled)
    assert made.warnings == ()


def test_a_prompt_that_t5_cuts_is_told(flux1: Callable[[str], SmallModel]) -> None:
    adapter = flux1("schnell").adapter
    assert adapter.encode_prompt("red " * 255).warnings == ()
    (warning,) = adapter.encode_prompt("red " * 300).warnings
    assert warning == "the prompt has 301 tokens, and only the first 256 were heeded"


def test_nothing_of_a_prompt_is_logged(
    flux1: Callable[[str], SmallModel], caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers' pipeline logs what it cuts."""
    adapter = flux1("dev").adapter
    with caplog.at_level(0):
        adapter.encode_prompt("secret " * 300)
    assert "secret" not in caplog.text


def test_a_shared_encoder_says_the_same(
    flux1: Callable[[str], SmallModel], flux1_folder: Callable[[str], Path]
) -> None:
    shared = load_prompt_encoder(
        str(flux1_folder("dev")), Placement("float32", "cpu"), tier_of("dev")
    )
    sent = unpack(pack(shared.encode_prompt(PROMPT)), "cpu")
    own = flux1("dev").adapter.encode_prompt(PROMPT)
    assert sent.tensors.keys() == own.tensors.keys() == {"embeds", "pooled"}
    assert all(torch.equal(sent.tensors[name], own.tensors[name]) for name in own.tensors)


def test_only_t5_is_quantized(flux1_folder: Callable[[str], Path]) -> None:
    placement = Placement("bfloat16", "cpu", encoder_quantization="fp8")
    encoder = load_prompt_encoder(str(flux1_folder("dev")), placement, tier_of("dev"))
    kinds = {
        type(weight).__name__ for weight in encoder.t5.parameters() if "Float8" in str(type(weight))
    }
    assert kinds == {"Float8Tensor"}
    assert {weight.dtype for weight in encoder.clip.parameters()} == {torch.bfloat16}
    assert encoder.encode_prompt(PROMPT).tensors["embeds"].isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantization", "error"), [("fp8", 0.2), ("int8", 0.1), ("nf4", 0.6)])
def test_with_fewer_bits_the_embeds_are_near(
    flux1: Callable[[str], SmallModel],
    flux1_folder: Callable[[str], Path],
    quantization: Any,
    error: float,
    dtype: str,
) -> None:
    """Measured: 0.13, 0.06 and 0.44, of random weights, for which quantization is at its worst."""
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    placement = Placement(dtype, "cpu", encoder_quantization=quantization)
    encoder = load_prompt_encoder(str(flux1_folder("dev")), placement, tier_of("dev"))
    embeds = encoder.encode_prompt(PROMPT).tensors["embeds"]
    assert str(embeds.dtype) == f"torch.{dtype}"
    plain = flux1("dev").adapter.encode_prompt(PROMPT).tensors["embeds"]
    assert 0.01 < (embeds.float() - plain).norm() / plain.norm() < error


def encoded(mesh: Mesh, folder: str) -> tuple[dict[str, Any], int]:
    torch.set_num_threads(1)
    encoder = load_prompt_encoder(folder, Placement("float32", "cpu", mesh), tier_of("dev"))
    assert isinstance(encoder, Flux1PromptEncoder)
    tensors = encoder.encode_prompt(PROMPT).tensors
    num_bytes = sum(parameter.nbytes for parameter in encoder.t5.parameters())
    return {name: tensor.numpy() for name, tensor in tensors.items()}, num_bytes


@pytest.mark.parametrize("parallel", [Parallel(tensor=2), Parallel(sequence=2)], ids=["TP2", "SP2"])
def test_ranks_that_split_t5_say_the_same(
    run_ranks: Ranks, flux1_folder: Callable[[str], Path], parallel: Parallel
) -> None:
    folder = str(flux1_folder("dev"))
    one, num_bytes = encoded(Mesh(), folder)
    for tensors, part_bytes in run_ranks(parallel, encoded, folder):
        assert part_bytes < 0.6 * num_bytes
        assert np.array_equal(tensors["pooled"], one["pooled"])
        error = abs(tensors["embeds"] - one["embeds"]).max()
        assert error <= 1e-5 * abs(one["embeds"]).max()
