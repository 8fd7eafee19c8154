"""The embedded checkpoint is what its card says, and draws what a fresh prompt asks for."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import Flux2KleinPipeline

from flux_ray.catalog.tiers import tier_for
from flux_ray.tiny import CHECKPOINT, evaluate
from flux_ray.tiny.judge import judge
from flux_ray.tiny.world import Scene, Thing

NUM_TASKS = 24


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    return evaluate.load_pipeline(CHECKPOINT)


def files() -> list[Path]:
    return [path for path in CHECKPOINT.rglob("*") if path.is_file()]


def test_it_is_small_and_safe_to_load() -> None:
    assert sum(path.stat().st_size for path in files()) <= 12_000_000
    assert {path.suffix for path in files()} <= {".safetensors", ".json", ".jinja", ".md"}


def test_it_is_distilled_klein(pipeline: Flux2KleinPipeline) -> None:
    assert type(pipeline) is Flux2KleinPipeline
    assert pipeline.config.is_distilled
    assert len(pipeline.text_encoder.model.layers) == 28


def quick_and_slow() -> list[Any]:
    """The sets, of which all but the first take too long to be drawn at every change."""
    first, *others = evaluate.TARGETED
    slow = [pytest.param(task_set, id=task_set.name, marks=pytest.mark.slow) for task_set in others]
    return [pytest.param(first, id=first.name), *slow]


@pytest.mark.parametrize("task_set", quick_and_slow())
def test_fresh_tasks_are_right(pipeline: Flux2KleinPipeline, task_set: evaluate.TaskSet) -> None:
    """A smoke alarm, not the measurement: far enough below the card not to ring by chance."""
    row = evaluate.measure(pipeline, task_set, NUM_TASKS)
    assert row["everything"] >= card_share(task_set.name) - 0.2, row


def card_share(name: str) -> float:
    """`everything` of a row of the card, 0..1."""
    card = (CHECKPOINT / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    return float(row.split("|")[7]) / 100


def test_the_card_has_every_set() -> None:
    for task_set in evaluate.SETS:
        assert 0 <= card_share(task_set.name) <= 1


def test_the_card_counts_the_parameters(pipeline: Flux2KleinPipeline) -> None:
    card = (CHECKPOINT / "README.md").read_text()
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        millions = sum(p.numel() for p in part.parameters()) / 1e6
        assert re.search(rf"{type(part).__name__}.*\| {millions:.2f} M \|", card), millions


def test_the_pipelines_own_text_length_works(pipeline: Flux2KleinPipeline) -> None:
    """512 tokens, always padded, never masked: nothing but the size is said."""
    scene = Scene("blue", (Thing("circle", "red", "large"),))
    image = pipeline(
        prompt="a red circle on a blue background",
        height=128,
        width=128,
        num_inference_steps=4,
        guidance_scale=1.0,
    ).images[0]
    assert judge(np.asarray(image), scene).everything


def test_seeds_differ_and_repeat(pipeline: Flux2KleinPipeline) -> None:
    task_set = evaluate.SETS[0]
    task = task_set.draw(random.Random(0))
    images = [evaluate.generate(pipeline, task, task_set, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_the_catalogue_asks_for_what_was_measured() -> None:
    tier = tier_for("tiny")
    assert (tier.text_length, tier.num_steps) == (evaluate.TEXT_LENGTH, 4)
