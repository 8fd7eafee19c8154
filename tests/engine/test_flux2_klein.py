"""The step loop draws what Flux2KleinPipeline draws: the same bits in fp32."""

import random
from dataclasses import replace

import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from flux_ray.catalog import tier_for
from flux_ray.engine.flux2_klein import Flux2Klein, check_model_index
from flux_ray.engine.loading import Placement
from flux_ray.engine.pictures import image_for, raster_for
from flux_ray.engine.state import Canvas, Conditioning, ImageState
from flux_ray.errors import BadReference
from flux_ray.request import Raster
from flux_ray.tiny import CHECKPOINT

PROMPT = "a red circle on a blue background"
SQUARE = Canvas(128, 128, num_steps=4)
LAPTOP = Placement("float32", "cpu")
TINY = tier_for("tiny")


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    """diffusers' own, loaded apart from the adapter's."""
    pipeline = Flux2KleinPipeline.from_pretrained(
        CHECKPOINT, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def adapter() -> Flux2Klein:
    return Flux2Klein.load("embedded", LAPTOP, TINY)


def reference(width: int, height: int, seed: int) -> Raster:
    """A picture with something everywhere, so that a pixel's shift would show."""
    pixels = random.Random(seed).randbytes(8 * 8 * 3)
    return raster_for(Image.frombytes("RGB", (8, 8), pixels).resize((width, height)))


def finish(adapter: Flux2Klein, state: ImageState) -> ImageState:
    while not state.is_done:
        state = adapter.denoise(state)
    return state


CASES = {
    "text": (SQUARE, 48, ()),
    "not square": (Canvas(160, 96, num_steps=3), 48, ()),
    "default padding": (SQUARE, 512, ()),
    "one step": (Canvas(64, 64, num_steps=1), 48, ()),
    "one reference": (SQUARE, 48, (reference(128, 128, 1),)),
    "two references": (SQUARE, 48, (reference(128, 128, 1), reference(96, 128, 2))),
    "cut to a multiple": (SQUARE, 48, (reference(201, 143, 3), reference(79, 110, 4))),
    "over a megapixel": (Canvas(64, 64, num_steps=1), 48, (reference(1400, 1000, 5),)),
}


@pytest.mark.parametrize(("canvas", "text_length", "references"), CASES.values(), ids=CASES)
def test_equals_the_pipeline_bit_for_bit(
    pipeline: Flux2KleinPipeline,
    adapter: Flux2Klein,
    canvas: Canvas,
    text_length: int,
    references: tuple[Raster, ...],
) -> None:
    last: dict[str, torch.Tensor] = {}

    def remember(_: object, step: int, timestep: object, tensors: dict) -> dict:
        last.update(tensors)
        return {}

    expected = pipeline(
        prompt=PROMPT,
        image=[image_for(raster) for raster in references] or None,
        width=canvas.width,
        height=canvas.height,
        num_inference_steps=canvas.num_steps,
        guidance_scale=1.0,
        max_sequence_length=text_length,
        generator=torch.Generator().manual_seed(7),
        callback_on_step_end=remember,
    ).images[0]

    tier = replace(TINY, text_length=text_length, max_reference_pixels=1024 * 1024)
    ours = Flux2Klein(adapter.pipeline, tier)
    state = finish(ours, ours.prepare(ours.encode(PROMPT, references), canvas, seed=7))

    assert torch.equal(state.latents, last["latents"])
    assert ours.decode(state) == raster_for(expected)


def test_images_take_turns_without_touching_each_other(adapter: Flux2Klein) -> None:
    """Different sizes, step counts and references, interleaved unevenly."""
    plain = adapter.encode(PROMPT, ())
    edit = adapter.encode("make the circle green", (reference(128, 128, 1),))
    jobs: list[tuple[Conditioning, Canvas, int]] = [
        (plain, SQUARE, 1),
        (edit, Canvas(96, 64, num_steps=7), 2),
        (plain, Canvas(64, 96, num_steps=2), 3),
    ]
    alone = [adapter.decode(finish(adapter, adapter.prepare(*job))) for job in jobs]

    states = [adapter.prepare(*job) for job in jobs]
    turns = random.Random(0)
    while unfinished := [i for i, state in enumerate(states) if not state.is_done]:
        turn = turns.choice(unfinished)
        states[turn] = adapter.denoise(states[turn])

    assert [adapter.decode(state) for state in states] == alone


@pytest.mark.parametrize(("width", "height"), [(63, 128), (1000, 64)])
def test_an_unusable_reference_is_the_callers_mistake(
    adapter: Flux2Klein, width: int, height: int
) -> None:
    with pytest.raises(BadReference) as caught:
        adapter.encode(PROMPT, (reference(width, height, 1),))
    assert caught.value.field == "image"


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": False}, "not step-distilled"),
        ({"_class_name": "Flux2KleinPipeline"}, "not step-distilled"),
    ],
)
def test_only_distilled_klein_is_loaded(index: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_model_index(index, "some/where@main")


def test_a_large_reference_is_scaled_to_what_the_tier_has_seen(adapter: Flux2Klein) -> None:
    pixels = adapter.reference_pixels(reference(512, 512, 6))
    assert pixels.shape == (1, 3, 192, 192)
    assert adapter.reference_pixels(reference(192, 128, 7)).shape == (1, 3, 128, 192)


def test_a_prompt_that_is_cut_is_told(adapter: Flux2Klein) -> None:
    assert adapter.encode(PROMPT, ()).warnings == ()
    (warning,) = adapter.encode("a red circle " + "very " * 60 + "on blue", ()).warnings
    assert "only the first 48 were heeded" in warning
