"""The step loop generates what diffusers' own FLUX.1 pipelines do: the same bits in fp32."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
)
from diffusers.pipelines.flux import pipeline_flux_kontext, pipeline_flux_kontext_inpaint
from torch import Tensor

from flux_ray.engine.api import Conditioning, ImageSpec
from flux_ray.engine.flux1.pipeline import Flux1
from flux_ray.engine.images import image_for, raster_for
from flux_ray.errors import BadReference
from flux_ray.request import Mask, RgbImage
from flux_ray.resizing import fit_image, fit_mask, mask_image
from tests.engine.flux1.conftest import SmallModel
from tests.engine.generation import SEED, finish, reference

Flux1Models = Callable[[str], SmallModel]
PROMPT = "a red circle on the blue background"
CANVAS = ImageSpec(128, 96, num_steps=4, guidance=3.5)


def expected(pipeline: DiffusionPipeline, canvas: ImageSpec, **options: Any) -> Any:
    """The last latents and the image of diffusers' pipeline."""
    last: dict[str, Tensor] = {}

    def remember(_: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        last.update(tensors)
        return {}

    images = pipeline(
        prompt=PROMPT,
        width=canvas.width,
        height=canvas.height,
        num_inference_steps=canvas.num_steps,
        guidance_scale=canvas.guidance,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=remember,
        **options,
    ).images
    return last["latents"], raster_for(images[0])


def generated(
    adapter: Flux1, canvas: ImageSpec, given: Conditioning | None = None
) -> tuple[Tensor, RgbImage]:
    """The last latents and the image of the adapter."""
    given = given or adapter.encode(adapter.encode_prompt(PROMPT), ())
    state = finish(adapter, adapter.prepare(given, canvas, SEED))
    return state.latents, adapter.decode(state)


def assert_equal(made: tuple[Tensor, RgbImage], wanted: tuple[Tensor, RgbImage]) -> None:
    assert torch.equal(made[0], wanted[0])
    assert made[1] == wanted[1]


@pytest.mark.parametrize(
    "canvas",
    [CANVAS, ImageSpec(64, 64, 1, guidance=1.0), ImageSpec(80, 208, 3, guidance=2.5)],
    ids=["four steps", "one step", "narrow"],
)
def test_dev(flux1: Flux1Models, canvas: ImageSpec) -> None:
    dev = flux1("dev")
    assert_equal(generated(dev.adapter, canvas), expected(dev.pipeline, canvas))


def test_guidance_counts_where_it_is_embedded(flux1: Flux1Models) -> None:
    low, high = (
        generated(flux1("dev").adapter, replace(CANVAS, guidance=guidance))[0]
        for guidance in (1.0, 4.0)
    )
    assert (low - high).abs().max() > 1e-3


def test_schnell(flux1: Flux1Models) -> None:
    schnell = flux1("schnell")
    wanted = expected(schnell.pipeline, CANVAS, max_sequence_length=256)
    assert_equal(generated(schnell.adapter, CANVAS), wanted)
    state = schnell.adapter.prepare(
        schnell.adapter.encode(schnell.adapter.encode_prompt(PROMPT), ()), CANVAS, SEED
    )
    assert state.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_a_negative_prompt(flux1: Flux1Models, kind: str) -> None:
    model = flux1(kind)
    canvas = replace(CANVAS, true_cfg_scale=2.5)
    given = model.adapter.encode(model.adapter.encode_prompt(PROMPT), ())
    given = replace(given, negative=model.adapter.encode_prompt("green star"))
    wanted = expected(
        model.pipeline,
        canvas,
        negative_prompt="green star",
        true_cfg_scale=2.5,
        max_sequence_length=model.tier.text_length,
    )
    assert_equal(generated(model.adapter, canvas, given), wanted)


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small resolutions in place of those about 1 MP, for both libraries."""
    sizes = [(96, 160), (128, 128), (160, 96)]
    for module in (pipeline_flux_kontext, pipeline_flux_kontext_inpaint):
        monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)


def kontext_case(
    model: SmallModel, size: tuple[int, int], canvas: ImageSpec, **options: Any
) -> None:
    """Check one reference; the pipeline keeps the size if it is told its area."""
    adapter, image = model.adapter, reference(*size, 1)
    given = adapter.encode(adapter.encode_prompt(PROMPT), (image,))
    if "negative_prompt" in options:
        given = replace(given, negative=adapter.encode_prompt(options["negative_prompt"]))
        canvas = replace(canvas, true_cfg_scale=options["true_cfg_scale"])
    area = canvas.width * canvas.height
    wanted = expected(model.pipeline, canvas, image=image_for(image), max_area=area, **options)
    assert_equal(generated(adapter, canvas, given), wanted)


@pytest.mark.usefixtures("few_sizes")
@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((200, 120), ImageSpec(128, 128, 3, guidance=2.5)),
        ((120, 200), ImageSpec(256, 96, 3, guidance=2.5)),
        ((333, 100), ImageSpec(128, 96, 3, guidance=2.5)),
    ],
)
def test_kontext(flux1: Flux1Models, size: tuple[int, int], canvas: ImageSpec) -> None:
    kontext_case(flux1("kontext"), size, canvas)


@pytest.mark.usefixtures("few_sizes")
def test_kontext_with_a_negative_prompt(flux1: Flux1Models) -> None:
    canvas = ImageSpec(128, 96, 2, guidance=2.5)
    options = {"negative_prompt": "green star", "true_cfg_scale": 2.0}
    kontext_case(flux1("kontext"), (120, 200), canvas, **options)


@pytest.mark.parametrize("size", [(128, 96), (140, 205)])
def test_a_reference_keeps_its_size_if_the_tier_has_none(
    flux1: Flux1Models, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    model = flux1("kontext")
    monkeypatch.setattr(model.adapter, "tier", replace(model.tier, reference_tokens=None))
    kontext_case(model, size, ImageSpec(128, 96, 2, guidance=2.5), _auto_resize=False)


def test_kontext_without_a_reference(flux1: Flux1Models) -> None:
    model = flux1("kontext")
    wanted = expected(model.pipeline, CANVAS, max_area=CANVAS.width * CANVAS.height)
    assert_equal(generated(model.adapter, CANVAS), wanted)


def test_a_reference_of_kontext_has_about_a_megapixel(flux1: Flux1Models) -> None:
    """Whatever its size: 1328 x 800. Though that is above 1 MP, it is encoded in one piece."""
    model, image = flux1("kontext"), reference(200, 120, 1)
    given = model.adapter.encode(model.adapter.encode_prompt(PROMPT), (image,))
    processor = model.pipeline.image_processor
    pixels = processor.preprocess(processor.resize(image_for(image), 800, 1328), 800, 1328)
    with torch.inference_mode():
        _, latents, _, ids = model.pipeline.prepare_latents(
            pixels, 1, 4, 64, 64, torch.float32, "cpu", torch.Generator()
        )
    assert torch.equal(given.references["latents"], latents)
    assert torch.equal(given.references["ids"], ids)
    assert latents.shape[1] == len(ids) == 4150


@pytest.mark.parametrize(
    ("references", "why"),
    [
        ((reference(64, 15, 1),), "at least 16 x 16"),
        ((reference(64, 64, 1), reference(64, 64, 2)), "one reference"),
    ],
)
def test_what_kontext_cannot_take_is_the_callers_mistake(
    flux1: Flux1Models, references: tuple[RgbImage, ...], why: str
) -> None:
    adapter = flux1("kontext").adapter
    with pytest.raises(BadReference, match=why):
        adapter.encode(adapter.encode_prompt(PROMPT), references)


def spots(width: int, height: int) -> Mask:
    """Squares of 10 pixels, half of them marked: no multiple of anything."""
    dice = np.random.default_rng(3).random((-(-height // 10), -(-width // 10))) > 0.5
    marks = np.kron(dice, np.ones((10, 10)))[:height, :width].astype(np.uint8) * 255
    return Mask(width, height, marks.tobytes())


def edited(
    adapter: Flux1, canvas: ImageSpec, image: RgbImage, mask: Mask
) -> tuple[Conditioning, Mask]:
    """As a rank does: image and mask are scaled to what is generated."""
    size = (canvas.width, canvas.height)
    image, mask = fit_image(image, size), fit_mask(mask, size)
    given = adapter.encode(adapter.encode_prompt(PROMPT), (image,))
    return adapter.edit(given, image, mask), mask


def assert_equal_inside(
    made: tuple[Tensor, RgbImage], wanted: tuple[Tensor, RgbImage], image: RgbImage, mask: Mask
) -> None:
    """Outside of the mask the pipelines decode what is the image's own here."""
    assert torch.equal(made[0], wanted[0])
    pixels, theirs, own = (np.asarray(image_for(each)) for each in (made[1], wanted[1], image))
    inside = np.asarray(mask_image(mask)) > 0
    assert inside.any() and not inside.all()
    assert (pixels[inside] == theirs[inside]).all()
    assert (pixels[~inside] == own[~inside]).all()


def test_fill(flux1: Flux1Models) -> None:
    """An image and a mask of another size."""
    model, canvas = flux1("fill"), replace(CANVAS, num_steps=3, guidance=30.0)
    image, mask = reference(150, 100, 2), spots(150, 100)
    given, scaled = edited(model.adapter, canvas, image, mask)
    wanted = expected(model.pipeline, canvas, image=image_for(image), mask_image=mask_image(mask))
    made = generated(model.adapter, canvas, given)
    assert_equal_inside(made, wanted, fit_image(image, (128, 96)), scaled)


def test_fill_without_a_mask_is_the_callers_mistake(flux1: Flux1Models) -> None:
    with pytest.raises(BadReference, match="needs an image and a mask"):
        generated(flux1("fill").adapter, CANVAS)


def test_control(flux1: Flux1Models) -> None:
    model, canvas = flux1("control"), replace(CANVAS, num_steps=3, guidance=10.0)
    adapter, image = model.adapter, reference(128, 96, 5)
    given = adapter.encode(adapter.encode_prompt(PROMPT), (image,))
    wanted = expected(model.pipeline, canvas, control_image=image_for(image))
    assert_equal(generated(adapter, canvas, given), wanted)


def test_control_without_an_image_is_the_callers_mistake(flux1: Flux1Models) -> None:
    adapter = flux1("control").adapter
    prompt = adapter.encode_prompt(PROMPT)
    with pytest.raises(BadReference, match="needs a control image"):
        # A request without references does not come to `encode`.
        generated(adapter, CANVAS, Conditioning(prompt))
    with pytest.raises(BadReference, match="needs one control image"):
        adapter.encode(prompt, (reference(64, 64, 1), reference(64, 64, 2)))


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_with_dev(flux1: Flux1Models, strength: float) -> None:
    model, canvas = flux1("dev"), replace(CANVAS, num_steps=5, strength=strength)
    image, mask = reference(150, 100, 2), spots(150, 100)
    given, scaled = edited(model.adapter, canvas, image, mask)
    wanted = expected(
        FluxInpaintPipeline(**model.pipeline.components),
        canvas,
        image=image_for(image),
        mask_image=mask_image(mask),
        strength=strength,
    )
    made = generated(model.adapter, canvas, given)
    assert_equal_inside(made, wanted, fit_image(image, (128, 96)), scaled)


@pytest.mark.usefixtures("few_sizes")
def test_inpainting_with_kontext(flux1: Flux1Models) -> None:
    """The pipeline generates in the reference's size."""
    model, canvas = flux1("kontext"), ImageSpec(160, 96, 3, guidance=2.5)
    image, mask = reference(160, 96, 2), spots(160, 96)
    given, scaled = edited(model.adapter, canvas, image, mask)
    wanted = expected(
        FluxKontextInpaintPipeline(**model.pipeline.components),
        canvas,
        image=image_for(image),
        mask_image=mask_image(mask),
        strength=1.0,
    )
    made = generated(model.adapter, canvas, given)
    assert_equal_inside(made, wanted, image, scaled)
