"""The step loop draws what Flux2Pipeline draws: the same bits in fp32, on a small random model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Pipeline
from transformers import AutoTokenizer

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import Lora
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.flux2.dev import check_index, load_tokenizer
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.request import RgbImage
from tests.engine.generation import generate, generate_with_pipeline, reference, save_lora

PROMPT = "a red circle [IMG] on a blue background"
DEV = tier_for("flux-2-dev")


@pytest.fixture(scope="module")
def pipeline(small_dev: Path) -> Flux2Pipeline:
    pipeline = Flux2Pipeline.from_pretrained(small_dev, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def adapter(small_dev: Path) -> Flux2:
    return Flux2.load(str(small_dev), Placement("float32", "cpu"), DEV)


CASES = {
    "text": (ImageSpec(64, 64, 3, guidance=4.0), ()),
    "little guidance": (ImageSpec(64, 64, 3, guidance=1.0), ()),
    "not square": (ImageSpec(112, 64, 2, guidance=2.5), ()),
    "one reference": (ImageSpec(64, 96, 2, guidance=4.0), (reference(80, 64, 1),)),
    "two references": (
        ImageSpec(64, 64, 2, guidance=4.0),
        (reference(201, 143, 2), reference(79, 110, 3)),
    ),
    "over a megapixel": (ImageSpec(64, 64, 1, guidance=4.0), (reference(1400, 1000, 4),)),
}


@pytest.mark.parametrize(("canvas", "references"), CASES.values(), ids=CASES)
def test_equals_the_pipeline_bit_for_bit(
    pipeline: Flux2Pipeline, adapter: Flux2, canvas: ImageSpec, references: tuple[RgbImage, ...]
) -> None:
    latents, image = generate(adapter, PROMPT, canvas, references)
    expected_latents, expected_image = generate_with_pipeline(pipeline, PROMPT, canvas, references)
    assert torch.equal(latents, expected_latents)
    assert image == expected_image


def test_a_lora_is_generated_as_the_pipeline_generates_it_fused(
    small_dev: Path, tmp_path: Path
) -> None:
    canvas = ImageSpec(64, 64, 2, guidance=4.0)
    save_lora(tmp_path / "style.safetensors")
    lora = Lora(path=str(tmp_path / "style.safetensors"), scale=0.1)
    adapter = Flux2.load(str(small_dev), Placement("float32", "cpu", loras=(lora,)), DEV)
    pipeline = Flux2Pipeline.from_pretrained(small_dev, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    plain, _ = generate_with_pipeline(pipeline, PROMPT, canvas, ())
    pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    pipeline.fuse_lora(lora_scale=0.1)
    expected, _ = generate_with_pipeline(pipeline, PROMPT, canvas, ())
    latents, _ = generate(adapter, PROMPT, canvas, ())
    assert (expected - plain).abs().max() > 0.1
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_guidance_counts(adapter: Flux2) -> None:
    canvas = ImageSpec(64, 64, 1, guidance=1.0)
    low, high = (
        generate(adapter, PROMPT, replace(canvas, guidance=guidance), ())[0]
        for guidance in (1.0, 4.0)
    )
    assert (low - high).abs().max() > 1e-3


def test_a_prompt_that_is_cut_is_told(adapter: Flux2) -> None:
    assert adapter.encode_prompt(PROMPT).warnings == ()
    (warning,) = adapter.encode_prompt("a very " * 300).warnings
    assert "only the first 512 were heeded" in warning


def test_only_flux2_with_guidance_is_loaded() -> None:
    with pytest.raises(ValueError, match="for Flux2KleinPipeline, not Flux2Pipeline"):
        check_index({"_class_name": "Flux2KleinPipeline"}, "some/where@main")


def test_a_chat_template_that_relies_on_the_processor_is_refused(
    small_dev: Path, tmp_path: Path
) -> None:
    """PixtralProcessor would add the token that the template lacks."""
    tokenizer = AutoTokenizer.from_pretrained(small_dev / "tokenizer", local_files_only=True)
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{- bos_token }}")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not begin with the BOS token"):
        load_tokenizer(tmp_path)
