"""The embedded Kontext draws, edits and fills what its pipeline does, and that is right."""

import random

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from flux_ray.catalog import tier_for
from flux_ray.engine.api import ImageSpec, Placement
from flux_ray.engine.flux1 import FAMILIES
from flux_ray.engine.images import image_for, raster_for
from flux_ray.request import Mask
from flux_ray.tiny import evaluate, world
from flux_ray.tiny.judge import judge
from tests.engine.generation import finish

TIER = tier_for("tiny-flux1")
SEED = 3


@pytest.fixture(scope="module")
def adapter():
    return FAMILIES[TIER.family].load(TIER.weights, Placement("float32", "cpu"), TIER)


@pytest.fixture(scope="module")
def pipeline() -> DiffusionPipeline:
    return evaluate.load_pipeline(evaluate.CHECKPOINTS["kontext"])


@pytest.mark.parametrize("name", ["one thing", "recolour", "recolour in a mask"])
def test_an_image_is_the_pipelines_and_right(
    adapter, pipeline: DiffusionPipeline, name: str
) -> None:
    """To a step of a byte: where weights lie in memory decides the last bits of a product.

    Under a mask the adapter pastes back what is kept, which the pipeline only resembles.
    """
    (task_set,) = (each for each in evaluate.SETS["kontext"] if each.name == name)
    task = task_set.draw(random.Random(1))
    references = tuple(raster_for(Image.fromarray(world.render(s))) for s in task.references)
    if isinstance(task, evaluate.FillTask):
        references = (raster_for(Image.fromarray(task.image)),)
    given = adapter.encode(adapter.encode_prompt(task.prompt), references)
    kept = np.zeros((128, 128), bool)
    if isinstance(task, evaluate.FillTask):
        kept = task.mask == 0
        mask = Mask(128, 128, task.mask.tobytes())
        given = adapter.edit(given, references[0], mask)
    canvas = ImageSpec(128, 128, TIER.num_steps, guidance=TIER.guidance)
    made = np.asarray(
        image_for(adapter.decode(finish(adapter, adapter.prepare(given, canvas, SEED))))
    )
    wanted = evaluate.generate(pipeline, task, task_set, SEED)
    assert abs(made[~kept].astype(int) - wanted[~kept]).max() <= 1
    assert judge(made, task.answer).everything
    if kept.any():
        assert np.array_equal(made[kept], task.image[kept])
