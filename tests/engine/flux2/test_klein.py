"""The step loop draws what Flux2KleinPipeline draws: the same bits in fp32."""

from dataclasses import replace

import pytest
import torch
from diffusers import Flux2KleinPipeline

from flux_ray.catalog.tiers import tier_for
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.flux2.klein import check_index
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.request import RgbImage
from flux_ray.tiny import CHECKPOINT
from tests.engine.generation import generate, generate_with_pipeline, reference

PROMPT = "a red circle on a blue background"
SQUARE = ImageSpec(128, 128, num_steps=4)
TINY = tier_for("tiny")


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    """diffusers' own, loaded apart from the adapter's."""
    pipeline = Flux2KleinPipeline.from_pretrained(
        CHECKPOINT, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CASES = {
    "text": (SQUARE, 48, ()),
    "not square": (ImageSpec(160, 96, num_steps=3), 48, ()),
    "default padding": (SQUARE, 512, ()),
    "one step": (ImageSpec(64, 64, num_steps=1), 48, ()),
    "one reference": (SQUARE, 48, (reference(128, 128, 1),)),
    "two references": (SQUARE, 48, (reference(128, 128, 1), reference(96, 128, 2))),
    "cut to a multiple": (SQUARE, 48, (reference(201, 143, 3), reference(79, 110, 4))),
    "over a megapixel": (ImageSpec(64, 64, num_steps=1), 48, (reference(1400, 1000, 5),)),
}


@pytest.mark.parametrize(("canvas", "text_length", "references"), CASES.values(), ids=CASES)
def test_equals_the_pipeline_bit_for_bit(
    pipeline: Flux2KleinPipeline,
    canvas: ImageSpec,
    text_length: int,
    references: tuple[RgbImage, ...],
) -> None:
    tier = replace(TINY, text_length=text_length, max_reference_pixels=1024 * 1024)
    adapter = Flux2.load("embedded", Placement("float32", "cpu"), tier)
    latents, image = generate(adapter, PROMPT, canvas, references)
    expected_latents, expected_image = generate_with_pipeline(
        pipeline, PROMPT, canvas, references, max_sequence_length=text_length
    )
    assert torch.equal(latents, expected_latents)
    assert image == expected_image


def test_guidance_changes_nothing_for_a_distilled_model(klein_adapter: Flux2) -> None:
    small = ImageSpec(64, 64, num_steps=1)
    plain, guided = (
        generate(klein_adapter, PROMPT, replace(small, guidance=guidance), ())
        for guidance in (1.0, 4.0)
    )
    assert torch.equal(plain[0], guided[0])


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({"_class_name": "Flux2Pipeline"}, "for Flux2Pipeline, not Flux2KleinPipeline"),
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": False}, "not step-distilled"),
        ({"_class_name": "Flux2KleinPipeline"}, "not step-distilled"),
    ],
)
def test_only_distilled_klein_is_loaded(index: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_index(index, "some/where@main")


def test_a_prompt_that_is_cut_is_told(klein_adapter: Flux2) -> None:
    assert klein_adapter.encode_prompt(PROMPT).warnings == ()
    long = klein_adapter.encode_prompt("a red circle " + "very " * 60 + "on blue")
    (warning,) = klein_adapter.encode(long, ()).warnings
    assert "only the first 48 were heeded" in warning
