"""What the kinds of FLUX.1 share: taking turns, previews, tiles, tables; and what is not loaded."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from flux_ray.engine import vae
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.flux1 import FAMILIES
from flux_ray.engine.flux1.pipeline import Flux1, latent_weights
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.request import Mask
from tests.engine.flux1.conftest import SmallModel, tier_of
from tests.engine.flux1.test_parity import CANVAS, PROMPT, edited, expected, generated, spots
from tests.engine.generation import SEED, finish, reference

Flux1Models = Callable[[str], SmallModel]


def test_images_take_turns_without_touching_each_other(flux1: Flux1Models) -> None:
    """Different sizes and step counts, one with a negative prompt, one with a mask."""
    adapter = flux1("dev").adapter
    plain = adapter.encode(adapter.encode_prompt(PROMPT), ())
    steered = replace(plain, negative=adapter.encode_prompt("green star"))
    inpainted, _ = edited(adapter, CANVAS, reference(128, 96, 1), spots(128, 96))
    jobs = [
        (plain, CANVAS, 1),
        (steered, ImageSpec(96, 64, 5, guidance=3.5, true_cfg_scale=3.0), 2),
        (inpainted, replace(CANVAS, strength=0.6), 3),
        (inpainted, CANVAS, 4),
    ]
    alone = [adapter.decode(finish(adapter, adapter.prepare(*job))) for job in jobs]
    states = [adapter.prepare(*job) for job in jobs]
    turns = random.Random(0)
    while unfinished := [i for i, state in enumerate(states) if not state.is_done]:
        turn = turns.choice(unfinished)
        states[turn] = adapter.denoise(states[turn])
    assert [adapter.decode(state) for state in states] == alone
    assert len({image.digest for image in alone}) == len(jobs)


def test_previews_change_nothing_and_the_last_is_the_image(flux1: Flux1Models) -> None:
    adapter = flux1("dev").adapter
    given = adapter.encode(adapter.encode_prompt(PROMPT), ())
    state = adapter.prepare(given, replace(CANVAS, has_previews=True), SEED)
    previews = []
    while not state.is_done:
        state = adapter.denoise(state)
        previews.append(adapter.preview(state))
    latents, image = generated(adapter, CANVAS, given)
    assert torch.equal(state.latents, latents)
    assert previews[-1] == image and previews[0] != image


def test_tables_are_built_once_per_image(flux1: Flux1Models) -> None:
    adapter = flux1("dev").adapter
    num_tokens: list[int] = []
    handle = adapter.rotary.embedder.register_forward_pre_hook(
        lambda _, inputs: num_tokens.append(inputs[0].shape[0])
    )
    generated(adapter, CANVAS)
    handle.remove()
    assert num_tokens == [512, 48]


def test_in_bf16_it_generates_the_pipelines_image(flux1_folder: Callable[[str], Path]) -> None:
    folder, tier = flux1_folder("dev"), tier_of("dev")
    adapter = FAMILIES["flux1"].load(str(folder), Placement("bfloat16", "cpu"), tier)
    assert isinstance(adapter, Flux1)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    made, wanted = generated(adapter, CANVAS), expected(pipeline, CANVAS)
    assert torch.equal(made[0], wanted[0])
    assert made[1] == wanted[1]


@pytest.fixture
def few_pixels_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 x 64 pixels stand for a megapixel: as large as a tile of the small VAE."""
    monkeypatch.setattr(vae, "MAX_WHOLE_PIXELS", 64 * 64)


@pytest.mark.usefixtures("few_pixels_whole")
def test_a_large_image_is_decoded_as_the_pipeline_does_in_tiles(flux1: Flux1Models) -> None:
    model, canvas = flux1("dev"), replace(CANVAS, num_steps=1)
    image = generated(model.adapter, canvas)[1]
    whole = expected(model.pipeline, canvas)[1]
    model.pipeline.vae.enable_tiling()
    tiled = expected(model.pipeline, canvas)[1]
    model.pipeline.vae.disable_tiling()
    assert image == tiled != whole
    assert not model.adapter.pipeline.vae.use_tiling, "for this image only"


@pytest.mark.usefixtures("few_pixels_whole")
def test_a_large_image_to_fill_is_encoded_in_tiles(flux1: Flux1Models) -> None:
    adapter = flux1("fill").adapter
    image, mask = reference(128, 96, 1), spots(128, 96)
    with_tiles, _ = edited(adapter, CANVAS, image, mask)
    vae.MAX_WHOLE_PIXELS = 128 * 96
    whole, _ = edited(adapter, CANVAS, image, mask)
    assert with_tiles.edit is not None and whole.edit is not None
    assert (with_tiles.edit.tensors["moments"] != whole.edit.tensors["moments"]).any()
    assert torch.equal(with_tiles.edit.tensors["mask"], whole.edit.tensors["mask"])


def test_no_mask_is_without_effect() -> None:
    """The upper left pixel of a latent counts, unless a mask marks none of these."""
    moments = torch.zeros(1, 8, 4, 8)

    def weights_of(column: int) -> list[float]:
        marks = bytearray(64 * 32)
        marks[column] = 255
        weights = latent_weights(Mask(64, 32, bytes(marks)), moments)
        assert weights.shape == (1, 4, 4, 8)
        return weights[0, 0, 0].tolist()

    assert weights_of(16) == [0, 0, 1, 0, 0, 0, 0, 0]
    assert weights_of(17) == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "of", "why"),
    [
        ("fill", "dev", "for FluxPipeline, not FluxFillPipeline"),
        ("dev", "kontext", "for FluxKontextPipeline, not FluxPipeline"),
        ("schnell", "dev", "have embedded guidance, which does not fit the tier flux-1-schnell"),
        ("dev", "schnell", "have no embedded guidance, which does not fit the tier flux-1-dev"),
    ],
)
def test_another_kind_of_checkpoint_is_refused_before_it_is_read(
    flux1_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    of: str,
    why: str,
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read"))
    tier, placement = tier_of(kind), Placement("float32", "cpu")
    for load in (FAMILIES[tier.family].load, FAMILIES[tier.family].load_prompt_encoder):
        with pytest.raises(ValueError, match=why):
            load(str(flux1_folder(of)), placement, tier)


def test_a_checkpoint_saved_by_an_older_transformers_is_loaded(
    flux1_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its index names T5TokenizerFast, as the published ones do."""
    folder = tmp_path / "dev"
    folder.symlink_to(flux1_folder("dev"))
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_2"][1] = "T5TokenizerFast"
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "model_index.json":
            (copy / path.name).symlink_to(path)
    (copy / "model_index.json").write_text(json.dumps(index))
    adapter = FAMILIES["flux1"].load(str(copy), Placement("float32", "cpu"), tier_of("dev"))
    assert adapter.encode_prompt(PROMPT).warnings == ()
