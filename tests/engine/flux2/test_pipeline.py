"""What all tiers of FLUX.2 share: taking turns, references, large images in tiles."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, Flux2Pipeline

from flux_ray.catalog.tiers import tier_for
from flux_ray.engine import vae
from flux_ray.engine.api import Conditioning, ImageSpec, Placement
from flux_ray.engine.flow import check_scheduler
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.errors import BadReference
from flux_ray.request import RgbImage
from tests.engine.generation import finish, generate, generate_with_pipeline, reference

PROMPT = "a red circle on a blue background"
SQUARE = ImageSpec(128, 128, num_steps=4)


def test_images_take_turns_without_touching_each_other(klein_adapter: Flux2) -> None:
    """Different sizes, step counts and references, interleaved unevenly."""
    adapter = klein_adapter
    plain = adapter.encode(adapter.encode_prompt(PROMPT), ())
    words = adapter.encode_prompt("make the circle green")
    edit = adapter.encode(words, (reference(128, 128, 1),))
    jobs: list[tuple[Conditioning, ImageSpec, int]] = [
        (plain, SQUARE, 1),
        (edit, ImageSpec(96, 64, num_steps=7), 2),
        (plain, ImageSpec(64, 96, num_steps=2), 3),
    ]
    alone = [adapter.decode(finish(adapter, adapter.prepare(*job))) for job in jobs]

    states = [adapter.prepare(*job) for job in jobs]
    turns = random.Random(0)
    while unfinished := [i for i, state in enumerate(states) if not state.is_done]:
        turn = turns.choice(unfinished)
        states[turn] = adapter.denoise(states[turn])

    assert [adapter.decode(state) for state in states] == alone


def test_previews_are_where_the_flow_leads_and_change_nothing(klein_adapter: Flux2) -> None:
    adapter = klein_adapter
    given = adapter.encode(adapter.encode_prompt(PROMPT), ())
    states = [adapter.prepare(given, replace(SQUARE, has_previews=True), 7)]
    previews = []
    while not states[-1].is_done:
        states.append(adapter.denoise(states[-1]))
        previews.append(adapter.preview(states[-1]))
    last = states[-1]
    plain = finish(adapter, adapter.prepare(given, SQUARE, 7))
    assert torch.equal(last.latents, plain.latents)
    assert previews[-1] == adapter.decode(last) == adapter.decode(plain)
    assert plain.velocity is None, "nothing is kept that nobody asked for"

    # To the end of the first step's straight line in one step.
    sigma = states[0].sigmas[0]
    clean = states[0].latents - sigma * adapter.velocity(states[0])
    expected = adapter.decode(replace(states[0], latents=clean))
    assert distance(previews[0], expected) < 1
    errors = [distance(preview, previews[-1]) for preview in previews]
    assert errors == sorted(errors, reverse=True), "each is nearer to the image"


def distance(one: RgbImage, other: RgbImage) -> float:
    """The mean of the bytes' differences."""
    pixels = [torch.frombuffer(bytearray(each.rgb), dtype=torch.uint8) for each in (one, other)]
    return float((pixels[0].float() - pixels[1].float()).abs().mean())


@pytest.mark.parametrize(("width", "height"), [(63, 128), (1000, 64)])
def test_an_unusable_reference_is_the_callers_mistake(
    klein_adapter: Flux2, width: int, height: int
) -> None:
    prompt = klein_adapter.encode_prompt(PROMPT)
    with pytest.raises(BadReference) as caught:
        klein_adapter.encode(prompt, (reference(width, height, 1),))
    assert caught.value.field == "image"


def test_a_large_reference_is_scaled_to_what_the_tier_has_seen(klein_adapter: Flux2) -> None:
    pixels = klein_adapter.reference_pixels(reference(512, 512, 6))
    assert pixels.shape == (1, 3, 192, 192)
    assert klein_adapter.reference_pixels(reference(192, 128, 7)).shape == (1, 3, 128, 192)


@pytest.fixture
def few_pixels_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 x 64 pixels stand for a megapixel: as large as a tile of the small VAE."""
    monkeypatch.setattr(vae, "MAX_WHOLE_PIXELS", 64 * 64)


@pytest.mark.usefixtures("few_pixels_whole")
@pytest.mark.parametrize("size", [(160, 96), (64, 64), (48, 80)])
def test_a_large_image_is_decoded_as_the_pipeline_does_in_tiles(
    small_dev: Path, size: tuple[int, int]
) -> None:
    adapter = Flux2.load(str(small_dev), Placement("float32", "cpu"), tier_for("flux-2-dev"))
    pipeline = Flux2Pipeline.from_pretrained(small_dev, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    canvas = ImageSpec(*size, 1, guidance=4.0)
    image = generate(adapter, PROMPT, canvas, ())[1]
    whole = generate_with_pipeline(pipeline, PROMPT, canvas, ())[1]
    pipeline.vae.enable_tiling()
    tiled = generate_with_pipeline(pipeline, PROMPT, canvas, ())[1]
    is_large = size == (160, 96)
    assert (tiled != whole) == (size != (64, 64))
    assert image == (tiled if is_large else whole)


@pytest.mark.usefixtures("few_pixels_whole")
def test_a_reference_is_encoded_whole_after_an_image_in_tiles(small_dev: Path) -> None:
    adapter = Flux2.load(str(small_dev), Placement("float32", "cpu"), tier_for("flux-2-dev"))
    prompt, references = adapter.encode_prompt(PROMPT), (reference(160, 96, 1),)
    before = adapter.encode(prompt, references)
    generate(adapter, PROMPT, ImageSpec(160, 96, 1), ())
    after = adapter.encode(prompt, references)
    assert torch.equal(before.references["latents"], after.references["latents"])


def test_an_image_of_up_to_a_megapixel_is_decoded_whole() -> None:
    assert vae.MAX_WHOLE_PIXELS == 1024 * 1024


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)]
)
def test_a_scheduler_that_steps_otherwise_is_refused(scheduler: object) -> None:
    with pytest.raises(ValueError, match=type(scheduler).__name__):
        check_scheduler(scheduler)
