"""Prompts are encoded as diffusers' own block encodes them: the same bits at any length."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLConfig

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import Parallel
from flux_ray.engine.api import Placement
from flux_ray.engine.flux3.checkpoint import KINDS, open_checkpoint
from flux_ray.engine.flux3.text_encoder import (
    LAYERS,
    Flux3PromptEncoder,
    language_model,
    load_encoder,
    load_tokenizer,
)
from flux_ray.engine.packing import pack, unpack
from flux_ray.engine.registry import load_prompt_encoder
from flux_ray.parallel.load import build_empty
from flux_ray.parallel.mesh import Mesh
from tests.engine.flux3.modular import PROMPT, blocks_pipeline
from tests.ranks import Ranks

TIER = tier_for("flux-3-klein")
LAPTOP = Placement("float32", "cpu")
# Their chat template adds to them; one is longer than 80 tokens, one than 160.
PROMPTS = ["", PROMPT, f"{PROMPT} and " * 11, f"{PROMPT} and " * 20]


@pytest.fixture(scope="module")
def folder(small_flux3: Callable[[str], Path]) -> Path:
    return small_flux3("flux-3-klein")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Flux3PromptEncoder:
    return load_prompt_encoder(TIER, str(folder), LAPTOP)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_block_and_is_padded_to_multiples_of_80(folder: Path, dtype: str) -> None:
    placement = Placement(dtype, "cpu")
    encoder = load_prompt_encoder(TIER, str(folder), placement)
    block = blocks_pipeline("flux-3-klein", folder, placement.torch_dtype)
    lengths = []
    for prompt in PROMPTS:
        encoded = encoder.encode_prompt(prompt)
        expected = block.blocks.sub_blocks["text_encoder"]._get_qwen3_vl_prompt_embeds(
            block.text_encoder, block.tokenizer, prompt
        )
        assert torch.equal(encoded.tensors["embeds"], expected)
        assert encoded.warnings == ()
        lengths.append(expected.shape[1])
    assert sorted(set(lengths)) == [80, 160, 240]


def test_a_prompt_that_is_cut_is_told(folder: Path) -> None:
    """At a length that is no multiple of 80, as in the block."""
    encoder = load_prompt_encoder(replace(TIER, text_length=100), str(folder), LAPTOP)
    block = blocks_pipeline("flux-3-klein", folder)
    long = PROMPTS[-1]
    encoded = encoder.encode_prompt(long)
    expected = block.blocks.sub_blocks["text_encoder"]._get_qwen3_vl_prompt_embeds(
        block.text_encoder, block.tokenizer, long, max_sequence_length=100
    )
    assert torch.equal(encoded.tensors["embeds"], expected)
    (warning,) = encoded.warnings
    assert "tokens, and only the first 100 were heeded" in warning


def test_a_prompt_crosses_a_process_border_bit_for_bit(encoder: Flux3PromptEncoder) -> None:
    prompt = encoder.encode_prompt(PROMPT)
    arrived = unpack(pack(prompt), "cpu")
    assert torch.equal(arrived.tensors["embeds"], prompt.tensors["embeds"])


def test_only_the_layers_that_are_read_are_held(encoder: Flux3PromptEncoder) -> None:
    model = encoder.text_encoder
    assert len(model.layers) == max(LAYERS) == 32
    assert not [name for name, _ in model.named_parameters() if "visual" in name]


def embeds_of_rank(mesh: Mesh, folder: Path) -> tuple[list[object], int]:
    source, _ = open_checkpoint(KINDS["flux3-klein"], str(folder))
    encoder = load_encoder(source, TIER, Placement("float32", "cpu", mesh))
    num_bytes = sum(parameter.nbytes for parameter in encoder.text_encoder.parameters())
    embeds = [encoder.encode_prompt(prompt).tensors["embeds"].numpy() for prompt in PROMPTS[:3]]
    return embeds, num_bytes


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_say_what_one_says_from_their_share_of_the_weights(
    run_ranks: Ranks, folder: Path, num_ranks: int
) -> None:
    expected, num_bytes = embeds_of_rank(Mesh(), folder)
    for embeds, part_bytes in run_ranks(Parallel(tensor=num_ranks), embeds_of_rank, folder):
        assert part_bytes < num_bytes * (1 / num_ranks + 0.1)
        for part, whole in zip(embeds, expected, strict=True):
            assert abs(part - whole).max() <= 1e-5 * abs(whole).max()


def test_a_model_with_too_few_layers_is_refused(folder: Path) -> None:
    config = Qwen3VLConfig.from_pretrained(folder / "text_encoder").text_config
    config.num_hidden_layers = 31
    with pytest.raises(ValueError, match="of 31 layers has no hidden state 32"):
        build_empty(language_model(config).build)


def test_a_tokenizer_without_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} has no chat template"):
        load_tokenizer(tmp_path)
