"""The step loop draws what the pipelines of the kinds of klein draw: the same bits in fp32."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from flux_ray.catalog.tiers import Tier
from flux_ray.engine.api import Adapter, ImageSpec, Placement
from flux_ray.engine.flux2.klein import check_base, check_distilled, check_kv
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.registry import load_adapter
from flux_ray.request import RgbImage
from flux_ray.tiny import KLEIN_CHECKPOINT
from tests.engine.generation import generate, generate_with_pipeline, reference
from tests.engine.kleins import BASE, KLEINS, KV, PIPELINES, index_of, negative_of

PROMPT = "a red circle on a blue background"
SQUARE = ImageSpec(128, 128, num_steps=4)


@pytest.fixture(scope="module")
def tier(request: pytest.FixtureRequest) -> Tier:
    """The kind that a test names."""
    return KLEINS[request.param]


@pytest.fixture(scope="module")
def pipeline(tier: Tier) -> DiffusionPipeline:
    """diffusers' own, loaded apart from the adapter's."""
    kind = PIPELINES[tier.family]
    options = {"is_distilled": False} if tier.family == BASE.family else {}
    pipeline = kind.from_pretrained(
        KLEIN_CHECKPOINT, dtype=torch.float32, local_files_only=True, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


Generate = Callable[..., tuple[Tensor, RgbImage]]


@pytest.fixture(scope="module")
def generate_here(tier: Tier, kleins: dict[str, Path]) -> Generate:
    """`generate` with an adapter of the tier and its guidance."""

    @cache
    def adapter_of(text_length: int) -> Adapter:
        padded = replace(tier, text_length=text_length, max_reference_pixels=1024 * 1024)
        return load_adapter(padded, str(kleins[tier.family]), Placement("float32", "cpu"))

    def generate_with(
        text_length: int, canvas: ImageSpec, references: tuple[RgbImage, ...]
    ) -> tuple[Tensor, RgbImage]:
        adapter = adapter_of(text_length)
        assert isinstance(adapter, Flux2)
        canvas = replace(canvas, true_cfg_scale=tier.true_cfg_scale)
        return generate(adapter, PROMPT, canvas, references, negative=negative_of(tier))

    return generate_with


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


# What base and KV do in their own ways: the rest is the code of the distilled klein.
OF_ALL = {"text", "two references", "cut to a multiple"}


@pytest.mark.parametrize(
    ("tier", "canvas", "text_length", "references"),
    [
        pytest.param(kind, *case, id=f"{kind}-{name}")
        for kind in KLEINS
        for name, case in CASES.items()
        if kind == "distilled" or name in OF_ALL
    ],
    indirect=["tier"],
)
def test_equals_the_pipeline_bit_for_bit(
    tier: Tier,
    pipeline: DiffusionPipeline,
    generate_here: Generate,
    canvas: ImageSpec,
    text_length: int,
    references: tuple[RgbImage, ...],
) -> None:
    latents, image = generate_here(text_length, canvas, references)
    takes_guidance = tier.family != KV.family
    expected_latents, expected_image = generate_with_pipeline(
        pipeline,
        PROMPT,
        canvas,
        references,
        max_sequence_length=text_length,
        guidance_scale=tier.true_cfg_scale if takes_guidance else None,
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


CHECKS = {"distilled": check_distilled, "base": check_base, "KV": check_kv}
REFUSED = {
    ("distilled", "base"): "not step-distilled .* serve them as a tier of klein base",
    ("distilled", "KV"): "for Flux2KleinKVPipeline, not Flux2KleinPipeline",
    ("base", "distilled"): "are step-distilled .* as a tier of klein, not of klein base",
    ("base", "KV"): "for Flux2KleinKVPipeline, not Flux2KleinPipeline",
    ("KV", "distilled"): "for Flux2KleinPipeline, not Flux2KleinKVPipeline",
    ("KV", "base"): "for Flux2KleinPipeline, not Flux2KleinKVPipeline",
}


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("given", CHECKS)
def test_each_kind_takes_only_its_own_weights(kind: str, given: str) -> None:
    index = index_of(KLEINS[given])
    if kind == given:
        CHECKS[kind](index, "some/where@main")
        return
    with pytest.raises(ValueError, match=REFUSED[kind, given]):
        CHECKS[kind](index, "some/where@main")


@pytest.mark.parametrize("check", [check_distilled, check_base, check_kv])
def test_another_family_is_refused(check: Callable[[dict[str, object], str], None]) -> None:
    with pytest.raises(ValueError, match="for Flux2Pipeline, not Flux2Klein"):
        check({"_class_name": "Flux2Pipeline"}, "some/where@main")


def test_an_index_that_does_not_say_is_taken_for_a_base_model_as_diffusers_does() -> None:
    index = {"_class_name": "Flux2KleinPipeline"}
    check_base(index, "some/where@main")
    with pytest.raises(ValueError, match="not step-distilled"):
        check_distilled(index, "some/where@main")


def test_a_prompt_that_is_cut_is_told(klein_adapter: Flux2) -> None:
    assert klein_adapter.encode_prompt(PROMPT).warnings == ()
    long = klein_adapter.encode_prompt("a red circle " + "very " * 60 + "on blue")
    (warning,) = klein_adapter.encode(long, ()).warnings
    assert "only the first 48 were heeded" in warning
