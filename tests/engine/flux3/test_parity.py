"""The step loop generates what diffusers' modular blocks generate: the same bits in fp32."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image

from flux_ray.catalog.tiers import tier_for
from flux_ray.engine import vae
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.encoding_cache import CachedEncoder
from flux_ray.engine.flux3.pipeline import Flux3
from flux_ray.engine.images import encode_image, raster_for
from flux_ray.errors import BadReference
from flux_ray.request import Encoding, ImageRequest, RgbImage
from tests.engine.flux3.modular import (
    PROMPT,
    blocks_pipeline,
    condition,
    finish,
    generate,
    generate_with_blocks,
)
from tests.engine.generation import SEED, reference

LAPTOP = Placement("float32", "cpu")
# (96 + 16) x (64 + 16) pixels: a side of 100 or 70 is no multiple of 16.
ODD = reference(100, 70, 3)


@pytest.fixture(scope="module", params=["flux-3-klein", "flux-3-klein-base"])
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def negative(tier: str) -> str | None:
    """The base model always steers away from a prompt, by default the empty one."""
    return "" if tier_for(tier).true_cfg_scale > 1 else None


@pytest.fixture(scope="module")
def pipeline(tier: str, small_flux3: Callable[[str], Path]) -> Any:
    return blocks_pipeline(tier, small_flux3(tier))


@pytest.fixture(scope="module")
def adapter(tier: str, small_flux3: Callable[[str], Path]) -> Flux3:
    return Flux3.load(str(small_flux3(tier)), LAPTOP, tier_for(tier))


def spec(tier: str, width: int, height: int, num_steps: int) -> ImageSpec:
    return ImageSpec(width, height, num_steps, true_cfg_scale=tier_for(tier).true_cfg_scale)


CASES: dict[str, tuple[int, int, int, tuple[RgbImage, ...]]] = {
    "text": (96, 64, 4, ()),
    "one step": (64, 64, 1, ()),
    "one reference, another size": (64, 96, 2, (ODD,)),
    "two references": (64, 64, 2, (ODD, reference(201, 143, 4))),
    "over a megapixel": (64, 64, 1, (reference(1400, 1000, 5), reference(64, 64, 6))),
}


@pytest.mark.parametrize(("width", "height", "num_steps", "references"), CASES.values(), ids=CASES)
def test_equals_the_blocks_bit_for_bit(
    tier: str,
    pipeline: Any,
    adapter: Flux3,
    negative: str | None,
    width: int,
    height: int,
    num_steps: int,
    references: tuple[RgbImage, ...],
) -> None:
    canvas = spec(tier, width, height, num_steps)
    latents, image = generate(adapter, canvas, references, negative)
    expected = generate_with_blocks(pipeline, canvas, references, width=width, height=height)
    assert torch.equal(latents, expected[0])
    assert image == expected[1]


def test_a_lone_reference_is_kept_whole_on_a_canvas_of_whole_tokens(
    tier: str, pipeline: Any, adapter: Flux3, negative: str | None
) -> None:
    """Without a size the blocks take that canvas, and crop the image back to the reference."""
    canvas = spec(tier, 112, 80, 2)
    latents, image = generate(adapter, canvas, (ODD,), negative)
    expected, cropped = generate_with_blocks(pipeline, canvas, (ODD,))
    assert torch.equal(latents, expected)
    assert (cropped.width, cropped.height) == (100, 70)
    rows = [image.rgb[3 * (112 * row + 6) :][: 3 * 100] for row in range(5, 75)]
    assert b"".join(rows) == cropped.rgb


def test_a_rank_and_its_leader_return_what_the_blocks_do(
    tier: str, pipeline: Any, adapter: Flux3, negative: str | None
) -> None:
    """From a request to the file; the second time of what is remembered."""
    row = tier_for(tier)
    canvas = row.canvas_of(ODD.width, ODD.height)
    assert canvas is not None
    asked = ImageRequest(
        "id",
        tier,
        PROMPT,
        canvas.width,
        canvas.height,
        2,
        row.guidance,
        SEED,
        references=(ODD,),
        encoding=Encoding(cropped_to=canvas.crop),
        negative_prompt=negative,
        true_cfg_scale=row.true_cfg_scale,
    )
    expected = generate_with_blocks(pipeline, spec(tier, 112, 80, 2), (ODD,))[1]
    remembering = CachedEncoder(adapter, 2**24, "cpu")
    for is_known in (False, True):
        given, was_known = remembering.encode(asked, ())
        assert was_known == is_known
        state = finish(adapter, adapter.prepare(given, spec(tier, 112, 80, 2), SEED))
        file = encode_image(adapter.decode(state), asked.encoding)
        assert raster_for(Image.open(io.BytesIO(file))) == expected


def test_a_negative_prompt_and_another_scale(small_flux3: Callable[[str], Path]) -> None:
    name = "flux-3-klein-base"
    adapter = Flux3.load(str(small_flux3(name)), LAPTOP, tier_for(name))
    pipeline = blocks_pipeline(name, small_flux3(name))
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    canvas = ImageSpec(96, 64, 2, true_cfg_scale=2.0)
    words = "a green square"
    latents, image = generate(adapter, canvas, (), words)
    size = {"width": 96, "height": 64}
    expected = generate_with_blocks(pipeline, canvas, (), negative_prompt=words, **size)
    assert torch.equal(latents, expected[0])
    assert image == expected[1]
    assert not torch.equal(latents, generate(adapter, canvas, (), "")[0])


@pytest.mark.parametrize("references", [(), (ODD,)], ids=["text", "reference"])
def test_bf16_equals_the_blocks_too(
    tier: str,
    small_flux3: Callable[[str], Path],
    negative: str | None,
    references: tuple[RgbImage, ...],
) -> None:
    """On the CPU at least. Queries and keys are normalised in fp32, with weights in fp32."""
    pipeline = blocks_pipeline(tier, small_flux3(tier), torch.bfloat16)
    adapter = Flux3.load(str(small_flux3(tier)), Placement("bfloat16", "cpu"), tier_for(tier))
    canvas = spec(tier, 96, 64, 3)
    latents, image = generate(adapter, canvas, references, negative)
    expected = generate_with_blocks(pipeline, canvas, references, width=96, height=64)
    assert latents.dtype == torch.bfloat16
    assert torch.equal(latents, expected[0])
    assert image == expected[1]


def test_images_that_take_turns_do_not_change_each_other(
    tier: str, adapter: Flux3, negative: str | None
) -> None:
    given = condition(adapter, (ODD,), negative)
    specs = [spec(tier, 64, 64, 2), spec(tier, 96, 64, 3)]
    expected = [finish(adapter, adapter.prepare(given, each, SEED)).latents for each in specs]
    states = [adapter.prepare(given, each, SEED) for each in specs]
    while not all(state.is_done for state in states):
        states = [state if state.is_done else adapter.denoise(state) for state in states]
    assert all(
        torch.equal(state.latents, latents) for state, latents in zip(states, expected, strict=True)
    )


def test_a_preview_after_the_last_step_but_one_is_near_the_image(
    tier: str, adapter: Flux3, negative: str | None
) -> None:
    canvas = replace(spec(tier, 64, 64, 4), has_previews=True)
    state = adapter.prepare(condition(adapter, (), negative), canvas, SEED)
    previews = []
    while not state.is_done:
        state = adapter.denoise(state)
        previews.append(adapter.preview(state))
    assert previews[-1] == adapter.decode(state), "nothing is left of the way"
    assert previews[0] != previews[-1]
    assert (previews[0].width, previews[0].height) == (64, 64)


def test_a_large_reference_is_encoded_in_tiles_and_a_small_one_whole(
    adapter: Flux3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, four megapixels would take 9 GB."""
    monkeypatch.setattr(vae, "MAX_WHOLE_PIXELS", 64 * 64)
    prompt = adapter.encode_prompt(PROMPT)
    tiled = []
    encode = adapter.vae.encode

    def noted(*pixels: Any) -> Any:
        tiled.append(adapter.vae.use_tiling)
        return encode(*pixels)

    monkeypatch.setattr(adapter.vae, "encode", noted)
    for size in ((128, 64), (64, 64)):
        adapter.encode(prompt, (reference(*size, 1),))
    assert tiled == [True, False] and not adapter.vae.use_tiling


def test_a_reference_without_a_whole_token_is_refused_beside_others(adapter: Flux3) -> None:
    prompt = adapter.encode_prompt(PROMPT)
    thin = reference(64, 15, 1)
    assert adapter.encode(prompt, (thin,)).references["latents"].shape[1] == 4 * 4
    with pytest.raises(BadReference, match="a reference of 64x15 is too narrow"):
        adapter.encode(prompt, (thin, ODD))
