"""The embedded checkpoint is what its card says, and draws what a fresh prompt asks for."""

import random
import re
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline, Flux2KleinPipeline, FluxKontextPipeline

from flux_ray.catalog.tiers import tier_for
from flux_ray.tiny import evaluate
from flux_ray.tiny.judge import judge
from flux_ray.tiny.world import Scene, Thing

NUM_TASKS = 24
TIERS = {"klein": "tiny", "kontext": "tiny-flux1"}


@pytest.fixture(scope="module")
def pipelines() -> dict[str, DiffusionPipeline]:
    return {
        layout: evaluate.load_pipeline(folder) for layout, folder in evaluate.CHECKPOINTS.items()
    }


@pytest.fixture(scope="module", params=TIERS)
def layout(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def pipeline(layout: str, pipelines: dict[str, DiffusionPipeline]) -> DiffusionPipeline:
    return pipelines[layout]


def test_it_is_small_and_safe_to_load(layout: str) -> None:
    files = [path for path in evaluate.CHECKPOINTS[layout].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_one_is_distilled_klein(pipelines: dict[str, DiffusionPipeline]) -> None:
    pipeline = pipelines["klein"]
    assert type(pipeline) is Flux2KleinPipeline
    assert pipeline.config.is_distilled
    assert len(pipeline.text_encoder.model.layers) == 28


def test_the_other_is_kontext_as_published(pipelines: dict[str, DiffusionPipeline]) -> None:
    pipeline = pipelines["kontext"]
    assert type(pipeline) is FluxKontextPipeline
    assert pipeline.transformer.config.guidance_embeds
    vae = pipeline.vae.config
    assert (vae.latent_channels, vae.scaling_factor, vae.shift_factor) == (16, 0.3611, 0.1159)
    assert pipeline.tokenizer.model_max_length == 77


def quick_and_slow() -> list[Any]:
    """The sets, of which all but the first take too long to be drawn at every change."""
    targeted = [(name, each) for name in TIERS for each in evaluate.SETS[name] if each.target]
    return [
        pytest.param(name, each, id=f"{name}, {each.name}", marks=[pytest.mark.slow] * (index > 0))
        for index, (name, each) in enumerate(targeted)
    ]


@pytest.mark.parametrize(("name", "task_set"), quick_and_slow())
def test_fresh_tasks_are_right(
    pipelines: dict[str, DiffusionPipeline], name: str, task_set: evaluate.TaskSet
) -> None:
    """A smoke alarm, not the measurement: far enough below the card not to ring by chance."""
    row = evaluate.measure(pipelines[name], task_set, NUM_TASKS)
    assert row["everything"] >= card_share(name, task_set.name) - 0.2, row


def card(layout: str) -> str:
    return (evaluate.CHECKPOINTS[layout] / "README.md").read_text()


def card_share(layout: str, name: str) -> float:
    """`everything` of a row of the card, 0..1."""
    row = next(line for line in card(layout).splitlines() if line.startswith(f"| {name} |"))
    return float(row.split("|")[7]) / 100


def test_the_card_has_every_set(layout: str) -> None:
    for task_set in evaluate.SETS[layout]:
        assert 0 <= card_share(layout, task_set.name) <= 1


def test_the_card_counts_the_parameters(layout: str, pipeline: DiffusionPipeline) -> None:
    models = [part for part in pipeline.components.values() if hasattr(part, "parameters")]
    for part in models:
        millions = sum(p.numel() for p in part.parameters()) / 1e6
        assert re.search(rf"{type(part).__name__}.*\| {millions:.2f} M \|", card(layout)), millions


def test_the_pipelines_own_text_length_works(layout: str, pipeline: DiffusionPipeline) -> None:
    """512 tokens, always padded, never masked: nothing but the size is said."""
    scene = Scene("blue", (Thing("circle", "red", "large"),))
    # Kontext's pipeline would scale any size to its own area.
    area = {"max_area": 128 * 128} if layout == "kontext" else {}
    image = pipeline(
        prompt="a red circle on a blue background",
        height=128,
        width=128,
        num_inference_steps=4,
        guidance_scale=1.0,
        **area,
    ).images[0]
    assert judge(np.asarray(image), scene).everything


def test_seeds_differ_and_repeat(layout: str, pipeline: DiffusionPipeline) -> None:
    task_set = evaluate.SETS[layout][0]
    task = task_set.draw(random.Random(0))
    images = [evaluate.generate(pipeline, task, task_set, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_the_catalogue_asks_for_what_was_measured(layout: str) -> None:
    tier = tier_for(TIERS[layout])
    assert (tier.text_length, tier.num_steps) == (evaluate.TEXT_LENGTH, 4)
