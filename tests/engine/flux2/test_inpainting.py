"""A part of an image is drawn as Flux2KleinInpaintPipeline does, and the rest stays as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2Transformer2DModel
from PIL import Image, ImageDraw
from torch import Tensor

from flux_ray.catalog.tiers import Tier, tier_for
from flux_ray.config.tier import Parallel
from flux_ray.engine import vae
from flux_ray.engine.api import Forward, ImageSpec, Placement
from flux_ray.engine.encoding_cache import CachedEncoder
from flux_ray.engine.flux2.activations import denoise_bytes
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.engine.images import image_for, raster_for
from flux_ray.engine.inpainting import token_weights
from flux_ray.parallel.load import build_empty
from flux_ray.request import ImageRequest, Mask, RgbImage, first_step
from flux_ray.resizing import fit_mask, mask_image
from flux_ray.tiny import KLEIN_CHECKPOINT
from flux_ray.tiny.judge import COLOR_INDEX, nearest_colors
from tests.engine.generation import SEED, finish, reference

PROMPT = "a red circle on a blue background"
TINY = tier_for("tiny")


def mask_of(width: int, height: int, *boxes: tuple[int, int, int, int]) -> Mask:
    """Marked in these boxes: left, top, right, bottom."""
    marks = np.zeros((height, width), np.uint8)
    for left, top, right, bottom in boxes:
        marks[top:bottom, left:right] = 255
    return Mask(width, height, marks.tobytes())


def circle_mask(width: int, height: int, radius: int) -> Mask:
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).circle((width // 2, height // 2), radius, fill=255)
    return Mask(width, height, image.tobytes())


def pixels_of(raster: RgbImage) -> np.ndarray:
    return np.frombuffer(raster.rgb, np.uint8).reshape(raster.height, raster.width, 3)


def marked(mask: Mask) -> np.ndarray:
    return np.frombuffer(mask.marks, np.uint8).reshape(mask.height, mask.width) > 0


def request(
    references: tuple[RgbImage, ...], mask: Mask | None, size: tuple[int, int], steps: int = 4
) -> ImageRequest:
    return ImageRequest(
        "id", "tiny", PROMPT, *size, steps, 1.0, SEED, references=references, mask=mask
    )


def generate(adapter: Flux2, asked: ImageRequest) -> tuple[Tensor, RgbImage]:
    """As a rank does: the last latents and the image."""
    conditioning, _ = CachedEncoder(adapter, 2**20, "cpu").encode(asked, ())
    state = finish(adapter, adapter.prepare(conditioning, canvas_of(asked), asked.seed))
    return state.latents, adapter.decode(state)


def canvas_of(asked: ImageRequest) -> ImageSpec:
    return ImageSpec(
        asked.width,
        asked.height,
        asked.num_steps,
        asked.guidance,
        true_cfg_scale=asked.true_cfg_scale,
        strength=asked.strength,
    )


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinInpaintPipeline:
    """diffusers' own, loaded apart from the adapter's."""
    pipeline = Flux2KleinInpaintPipeline.from_pretrained(
        KLEIN_CHECKPOINT, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_with_pipeline(
    pipeline: Flux2KleinInpaintPipeline, asked: ImageRequest
) -> tuple[Tensor, RgbImage]:
    """The last latents and the image."""
    last: dict[str, Tensor] = {}

    def remember(_: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        last.update(tensors)
        return {}

    assert asked.mask is not None
    image, *others = (image_for(raster) for raster in asked.references)
    images = pipeline(
        prompt=PROMPT,
        image=image,
        mask_image=mask_image(asked.mask),
        image_reference=others or None,
        strength=asked.strength,
        num_inference_steps=asked.num_steps,
        guidance_scale=asked.true_cfg_scale,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=remember,
        max_sequence_length=TINY.text_length,
    ).images
    return last["latents"], raster_for(images[0])


CASES = {
    "a box of whole tokens": request(
        (reference(128, 128, 1),), mask_of(128, 128, (32, 48, 96, 112)), (128, 128)
    ),
    "a circle": request((reference(160, 96, 2),), circle_mask(160, 96, 37), (160, 96), 3),
    "one step": request(
        (reference(128, 128, 1),), mask_of(128, 128, (0, 0, 64, 128)), (128, 128), 1
    ),
    "half a token": request(
        (reference(96, 96, 3),), mask_of(96, 96, (40, 40, 64, 72), (7, 0, 9, 9)), (96, 96), 2
    ),
    "no multiple": request((reference(143, 121, 4),), circle_mask(143, 121, 40), (128, 112)),
    "another reference": request(
        (reference(128, 128, 1), reference(112, 96, 5)), circle_mask(128, 128, 40), (128, 128)
    ),
    "all of it": request(
        (reference(128, 128, 1),), mask_of(128, 128, (0, 0, 128, 128)), (128, 128)
    ),
}
CIRCLE = CASES["a circle"]
CASES |= {
    "strength 0.8": replace(CIRCLE, num_steps=5, strength=0.8),
    "strength 0.5, and another reference": replace(CASES["another reference"], strength=0.5),
    "strength for one step": replace(CIRCLE, num_steps=4, strength=0.1),
    "guided": replace(CIRCLE, negative_prompt="", true_cfg_scale=4.0),
    "guided, another reference, strength 0.8": replace(
        CASES["another reference"],
        num_steps=5,
        negative_prompt="",
        true_cfg_scale=4.0,
        strength=0.8,
    ),
}


@pytest.mark.parametrize("asked", CASES.values(), ids=CASES)
def test_equals_the_pipeline_bit_for_bit(
    pipeline: Flux2KleinInpaintPipeline, klein_adapter: Flux2, asked: ImageRequest
) -> None:
    """Inside of the mask: outside the pipeline decodes what is the image here."""
    latents, image = generate(klein_adapter, asked)
    if asked.negative_prompt is not None:
        pipeline = Flux2KleinInpaintPipeline(**pipeline.components, is_distilled=False)
        pipeline.set_progress_bar_config(disable=True)
    expected_latents, expected_image = generate_with_pipeline(pipeline, asked)
    assert torch.equal(latents, expected_latents)
    inside = marked(fit_mask(asked.mask, (asked.width, asked.height)))
    assert (pixels_of(image)[inside] == pixels_of(expected_image)[inside]).all()


@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
def test_strength_leaves_out_the_steps_that_diffusers_does(
    pipeline: Flux2KleinInpaintPipeline, num_steps: int
) -> None:
    pipeline.scheduler.set_timesteps(num_steps, mu=1.0)
    for strength in (0.1, 0.29, 0.3, 0.5, 0.57, 0.58, 0.7, 0.8, 0.9, 0.99, 1.0):
        timesteps, _ = pipeline.get_timesteps(num_steps, strength, "cpu")
        assert num_steps - first_step(num_steps, strength) == len(timesteps)
    assert first_step(num_steps, 1e-30) == num_steps - 1, "the last step is always made"


def test_less_strength_leaves_more_of_the_image(klein_adapter: Flux2) -> None:
    """All of it is marked, so that what is left came by the noise alone."""
    asked = request((scene(),), mask_of(128, 128, (0, 0, 128, 128)), (128, 128))
    asked = replace(asked, prompt="a green star on a white background")
    changed = []
    for strength in (1.0, 0.75, 0.5, 0.25):
        after = generate(klein_adapter, replace(asked, strength=strength))[1]
        difference = pixels_of(after).astype(int) - pixels_of(scene()).astype(int)
        changed.append(abs(difference).mean())
    assert changed == sorted(changed, reverse=True)
    assert changed[-1] < 0.5 * changed[0]


def test_a_mask_of_all_changes_nothing(klein_adapter: Flux2) -> None:
    everything = CASES["all of it"]
    latents, image = generate(klein_adapter, everything)
    plain_latents, plain = generate(klein_adapter, replace(everything, mask=None))
    assert torch.equal(latents, plain_latents)
    assert image == plain


@pytest.mark.parametrize(
    ("box", "first_row"),
    [
        ((16, 0, 17, 1), [0, 1, 0, 0]),
        ((16, 0, 40, 6), [0, 1, 1, 0]),
        ((16, 0, 40, 8), [0, 0.5, 0.25, 0]),
        ((16, 0, 40, 16), [0, 1, 0.5, 0]),
    ],
)
def test_no_mask_is_without_effect(box: tuple[int, int, int, int], first_row: list[float]) -> None:
    """The middle of a token counts, unless a mask marks none of these."""
    weights = token_weights(mask_of(64, 32, box), torch.zeros(1, 8, 4))
    assert weights.shape == (1, 8, 1)
    assert weights.view(2, 4)[0].tolist() == first_row


def scene() -> RgbImage:
    """A red circle on blue."""
    image = Image.new("RGB", (128, 128), "blue")
    ImageDraw.Draw(image).circle((64, 64), 36, fill="red")
    return raster_for(image)


def shares(pixels: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """Of each colour there."""
    colors = nearest_colors(pixels)[where]
    return {name: (colors == index).mean() for name, index in COLOR_INDEX.items()}


def test_only_what_is_marked_changes(klein_adapter: Flux2) -> None:
    """Half of a circle turns green; the rest stays to the pixel, which no decoder gives back."""
    mask = mask_of(128, 128, (64, 0, 128, 128))
    asked = replace(request((scene(),), mask, (128, 128)), prompt="make the circle green")
    before, after = pixels_of(scene()), pixels_of(generate(klein_adapter, asked)[1])
    right, circle = marked(mask), marked(circle_mask(128, 128, 30))
    assert (after[~right] == before[~right]).all()
    assert shares(after, circle & right)["green"] > 0.9
    assert shares(after, circle & ~right)["red"] == 1
    both = pixels_of(generate(klein_adapter, replace(asked, mask=None))[1])
    assert shares(both, circle & ~right)["green"] > 0.9, "without a mask it is all of the circle"
    assert (both[~right] != before[~right]).any()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_preview_shows_the_rest_as_it_is(klein_adapter: Flux2, strength: float) -> None:
    image, mask = reference(128, 128, 1), circle_mask(128, 128, 40)
    asked = replace(request((image,), mask, (128, 128)), strength=strength)
    conditioning, _ = CachedEncoder(klein_adapter, 2**20, "cpu").encode(asked, ())
    canvas = replace(canvas_of(asked), has_previews=True)
    state = klein_adapter.denoise(klein_adapter.prepare(conditioning, canvas, asked.seed))
    preview = pixels_of(klein_adapter.preview(state))
    changed = (preview != pixels_of(image)).any(axis=2)
    assert not changed[~marked(mask)].any()
    assert changed[marked(mask)].mean() > 0.9
    state = finish(klein_adapter, state)
    assert torch.equal(state.latents, generate(klein_adapter, asked)[0])


def test_an_image_is_scaled_to_the_size_generated_and_its_mask_alike(klein_adapter: Flux2) -> None:
    mask = mask_of(256, 256, (128, 64, 256, 192))
    large = raster_for(image_for(scene()).resize((256, 256), Image.Resampling.NEAREST))
    after = pixels_of(generate(klein_adapter, request((large,), mask, (128, 128)))[1])
    scaled = pixels_of(raster_for(image_for(large).resize((128, 128), Image.Resampling.LANCZOS)))
    inside = marked(mask_of(128, 128, (64, 32, 128, 96)))
    assert (after[~inside] == scaled[~inside]).all()
    assert (after[inside] != scaled[inside]).any()


def test_a_scaled_mask_has_two_values() -> None:
    scaled = fit_mask(circle_mask(200, 150, 60), (128, 96))
    assert set(scaled.marks) == {0, 255}
    area = marked(circle_mask(128, 96, 38)).sum()
    assert marked(scaled).sum() == pytest.approx(area, rel=0.05)


def test_a_speck_is_not_lost_where_nothing_else_is_marked() -> None:
    speck = mask_of(2000, 1500, (1999, 1499, 2000, 1500))
    assert np.argwhere(marked(fit_mask(speck, (128, 96)))).tolist() == [[95, 127]]
    assert marked(fit_mask(mask_of(64, 64, (63, 0, 64, 1)), (128, 96))).any()


def test_images_and_masks_are_told_apart_by_what_is_remembered(klein_adapter: Flux2) -> None:
    """The same image in two sizes, with and without a mask, with another mask."""
    image = reference(143, 121, 4)
    masks = circle_mask(143, 121, 40), mask_of(143, 121, (0, 0, 70, 121))
    asked = [
        request((image,), None, (128, 112)),
        request((image,), masks[0], (128, 112)),
        request((image,), masks[1], (128, 112)),
        request((image,), masks[1], (96, 80)),
        request((image, image), masks[1], (96, 80)),
    ]
    remembering = CachedEncoder(klein_adapter, 2**24, "cpu")

    def generate_known(each: ImageRequest) -> RgbImage:
        conditioning, _ = remembering.encode(each, ())
        canvas = ImageSpec(each.width, each.height, each.num_steps)
        state = finish(klein_adapter, klein_adapter.prepare(conditioning, canvas, SEED))
        return klein_adapter.decode(state)

    fresh = [generate(klein_adapter, each)[1] for each in asked]
    assert [generate_known(each) for each in asked] == fresh
    assert [generate_known(each) for each in reversed(asked)] == fresh[::-1]


def test_an_edit_of_the_generated_size_knows_its_image(klein_adapter: Flux2) -> None:
    """It is encoded as it is without a mask."""
    remembering = CachedEncoder(klein_adapter, 2**24, "cpu")
    plain = request((reference(128, 128, 1),), None, (128, 128))
    remembering.encode(plain, ())
    masked = replace(plain, prompt="another", mask=circle_mask(128, 128, 40))
    assert remembering.encode(masked, ())[1]
    assert replace(masked, width=64).references_name != plain.references_name


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Tier:
    """64 x 64 pixels stand for a megapixel: for references, and for what is coded whole."""
    monkeypatch.setattr(vae, "MAX_WHOLE_PIXELS", 64 * 64)
    return replace(tier_for("flux-2-dev"), max_reference_pixels=64 * 64)


def test_a_large_image_is_a_small_reference_and_kept_whole(
    small_dev: Path, small_limits: Tier
) -> None:
    """Its tokens are no more than those of any reference: what a replica has memory for."""
    adapter = Flux2.load(str(small_dev), Placement("float32", "cpu"), small_limits)
    image, mask = reference(160, 96, 1), mask_of(160, 96, (0, 0, 80, 96))
    asked = replace(request((image,), mask, (160, 96), steps=2), guidance=4.0)
    conditioning, _ = CachedEncoder(adapter, 2**20, "cpu").encode(asked, ())
    assert conditioning.references["latents"].shape[1] == 5 * 3
    assert conditioning.edit.tensors["latents"].shape[1] == 10 * 6
    vae = adapter.pipeline.vae
    assert not vae.use_tiling, "for this image only"
    latents, generated = generate(adapter, asked)
    assert latents.shape[1] == 10 * 6
    inside = marked(mask)
    assert (pixels_of(generated)[~inside] == pixels_of(image)[~inside]).all()
    assert (pixels_of(generated)[inside] != pixels_of(image)[inside]).any()
    kept = conditioning.edit.tensors["weights"][0, :, 0] == 0
    assert torch.equal(latents[0, kept], conditioning.edit.tensors["latents"][0, kept])


def test_what_a_mask_holds_is_nothing_beside_a_step() -> None:
    """The memory plan does not count it."""
    dev, config = tier_for("flux-2-dev"), build_empty(lambda: Flux2Transformer2DModel()).config
    image = dev.max_pixels // 16**2
    largest = Forward(dev.text_length, image + 6 * 4096, Parallel(tensor=8), 2)
    held = 2 * image * config.in_channels * 2
    assert held < 0.01 * denoise_bytes(config, largest)


def test_dev_keeps_what_is_not_marked(small_dev: Path) -> None:
    dev = tier_for("flux-2-dev")
    adapter = Flux2.load(str(small_dev), Placement("float32", "cpu"), dev)
    image = reference(96, 64, 1)
    whole = replace(request((image,), mask_of(96, 64, (0, 0, 96, 64)), (96, 64)), guidance=4.0)
    plain = generate(adapter, replace(whole, mask=None))
    latents, generated = generate(adapter, whole)
    assert torch.equal(latents, plain[0]) and generated == plain[1]
    mask = mask_of(96, 64, (32, 16, 64, 48))
    part = pixels_of(generate(adapter, replace(whole, mask=mask))[1])
    assert (part[~marked(mask)] == pixels_of(image)[~marked(mask)]).all()
    assert (part[marked(mask)] != pixels_of(image)[marked(mask)]).any()
