"""Measure how often an embedded checkpoint is right: `python -m flux_ray.tiny.evaluate`.

Fresh tasks of each kind are given to diffusers' own pipeline, and its images are judged by their
pixels, without another model. The rows are the table of the model card.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from flux_ray.tiny import KLEIN_CHECKPOINT, KONTEXT_CHECKPOINT, tasks, world
from flux_ray.tiny.judge import Verdict, judge
from flux_ray.tiny.tasks import Task
from flux_ray.tiny.world import OTHER_CANVASES, Pixels

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TEXT_LENGTH = 48
DEFAULT_TEXT_LENGTH = 512
# None of the seeds used in training, so that the tasks here are not those it was trained on.
SEED = 20_261_123
# Pixels around the largest thing that a mask to fill leaves for it.
HOLE_MARGIN = 6


@dataclass(frozen=True)
class TaskSet:
    """A row of the table: one kind of task, and the settings it is generated with.

    `draw` returns a random task. `target`: the share of images that must be right in everything, if
    there is a goal for this row.
    """

    name: str
    draw: Callable[[random.Random], Task]
    target: float | None = None
    text_length: int = TEXT_LENGTH
    num_steps: int = 4


def draw_caption(rng: random.Random, scene: world.Scene) -> Task:
    """Return a task to generate the scene from a caption.

    The answer is the scene without jitter, as no caption tells where exactly a thing is.
    """
    return tasks.draw_caption_task(world.nominal(scene), rng)


def draw_single(rng: random.Random) -> Task:
    """Return a random text-to-image task with a single thing."""
    return draw_caption(rng, world.draw_single(rng))


def draw_combination(rng: random.Random) -> Task:
    """Return a random task with two references, of either kind."""
    draw = rng.choice((tasks.draw_color_of_task, tasks.draw_background_of_task))
    return draw(rng)


@dataclass(frozen=True)
class FillTask(Task):
    """A task to generate what a mask shows, uint8 [height, width] of 0 and 255, of an image."""

    image: Pixels
    mask: Pixels


def draw_fill(rng: random.Random) -> FillTask:
    """Return a random task to put another thing in the place of the one in an image."""
    scene = world.nominal(world.draw_single(rng))
    while True:
        thing = world.draw_thing(rng, not_colors=(scene.background, scene.things[0].color))
        if thing.shape != scene.things[0].shape:
            break
    old = scene.things[0]
    answer = replace(scene, things=(replace(thing, size=old.size, place=old.place),))
    return under_mask(draw_caption(rng, answer), scene)


def draw_masked_recolor(rng: random.Random) -> FillTask:
    """Return a random task to recolour the one thing in an image, with a mask around it."""
    task = tasks.draw_recolor_task(rng, num_things=1)
    return under_mask(task, task.references[0])


def under_mask(task: Task, scene: world.Scene) -> FillTask:
    """Return the task for a masked image of the scene instead of references."""
    # The largest thing that may be there, and some pixels around it.
    thing = replace(scene.things[0], shape="circle", size="large")
    hole = world.outline(thing, scene) < HOLE_MARGIN
    mask = np.where(hole, 255, 0).astype(np.uint8)
    return FillTask(task.prompt, (), task.answer, task.parse, world.render(scene), mask)


FIRST_SETS = (
    TaskSet("one thing", draw_single, 0.90),
    TaskSet(
        "one thing, pair never seen",
        lambda rng: draw_caption(rng, world.draw_single(rng, held_out=True)),
        0.80,
    ),
    TaskSet("two things", lambda rng: draw_caption(rng, world.draw_double(rng)), 0.60),
    TaskSet("recolour", lambda rng: tasks.draw_recolor_task(rng, num_things=1), 0.85),
    TaskSet("recolour, one of two things", lambda rng: tasks.draw_recolor_task(rng, num_things=2)),
    TaskSet(
        "recolour to a pair never seen",
        lambda rng: tasks.draw_recolor_task(rng, num_things=1, held_out=True),
    ),
    TaskSet("new background", lambda rng: tasks.draw_background_task(rng, num_things=1), 0.85),
    TaskSet(
        "new background behind two things",
        lambda rng: tasks.draw_background_task(rng, num_things=2),
    ),
)
LAST_SETS = (
    TaskSet("one thing, text length 512", draw_single, text_length=DEFAULT_TEXT_LENGTH),
    TaskSet(
        "one thing, other sizes",
        lambda r: draw_caption(r, world.draw_single(r, canvas=r.choice(OTHER_CANVASES))),
    ),
    TaskSet("one thing, 1 step", draw_single, num_steps=1),
    TaskSet("one thing, 8 steps", draw_single, num_steps=8),
)
# The rows of each model's card.
SETS = {
    "klein": (*FIRST_SETS, TaskSet("two references", draw_combination, 0.80), *LAST_SETS),
    "kontext": (
        *FIRST_SETS,
        TaskSet("recolour in a mask", draw_masked_recolor),
        TaskSet("another thing in a mask", draw_fill),
        *LAST_SETS,
    ),
}
CHECKPOINTS = {"klein": KLEIN_CHECKPOINT, "kontext": KONTEXT_CHECKPOINT}


def load_pipeline(checkpoint: Path) -> "DiffusionPipeline":
    """Load the checkpoint with plain diffusers, in fp32."""
    # Not at the top: diffusers prints warnings when it is imported, and `--help` would show them.
    from diffusers import DiffusionPipeline

    pipeline: DiffusionPipeline = DiffusionPipeline.from_pretrained(
        checkpoint, dtype=torch.float32, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: "DiffusionPipeline", task: Task, task_set: TaskSet, seed: int) -> Pixels:
    """Generate a task's image with diffusers' own `__call__`: uint8 [height, width, 3]."""
    references = [Image.fromarray(world.render(scene)) for scene in task.references]
    call, options = call_of(pipeline, task)
    image = call(
        **{"prompt": task.prompt, "image": references or None} | options,
        width=task.answer.width,
        height=task.answer.height,
        num_inference_steps=task_set.num_steps,
        max_sequence_length=task_set.text_length,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.asarray(image)


def call_of(
    pipeline: "DiffusionPipeline", task: Task
) -> tuple["DiffusionPipeline", dict[str, Any]]:
    """Return the pipeline that does the task, and the options that only its layout has."""
    from diffusers import FluxKontextInpaintPipeline, FluxKontextPipeline

    if not isinstance(pipeline, FluxKontextPipeline):
        return pipeline, {"guidance_scale": 1.0}
    # Otherwise it would generate, and see references, at about a megapixel.
    max_area = task.answer.width * task.answer.height
    options = {"guidance_scale": 2.5, "max_area": max_area, "_auto_resize": False}
    if not isinstance(task, FillTask):
        return pipeline, options
    inpaint = FluxKontextInpaintPipeline(**pipeline.components)
    inpaint.set_progress_bar_config(disable=True)
    image, mask = Image.fromarray(task.image), Image.fromarray(task.mask)
    return inpaint, options | {"image": image, "mask_image": mask, "strength": 1.0}


def measure(pipeline: "DiffusionPipeline", task_set: TaskSet, count: int) -> dict[str, float]:
    """Run `count` tasks; return the share of each verdict, 0 to 1, and the median seconds.

    The tasks and seeds depend only on the set's name, so two checkpoints get the same ones.
    """
    rng = random.Random(f"{SEED} {task_set.name}")
    verdicts, seconds = [], []
    for index in range(count):
        task = task_set.draw(rng)
        start = time.perf_counter()
        image = generate(pipeline, task, task_set, seed=index)
        seconds.append(time.perf_counter() - start)
        verdicts.append(judge(image, task.answer))
    names = [field.name for field in fields(Verdict)] + ["everything"]
    shares = {name: float(np.mean([getattr(v, name) for v in verdicts])) for name in names}
    return shares | {"seconds": float(np.median(seconds))}


def format_row(task_set: TaskSet, row: dict[str, float]) -> str:
    """Return a line of the model card's table, in percent."""
    names = ("color", "shape", "place", "size", "background", "everything")
    target = "" if task_set.target is None else f"{task_set.target:.0%}"
    cells = [task_set.name, *(f"{100 * row[name]:.1f}" for name in names), target]
    return f"| {' | '.join(cells)} | {row['seconds']:.3f} |"


def main() -> None:
    """Print the table, and all numbers as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description="Measure the tiny checkpoint by pixels.")
    parser.add_argument("--layout", choices=SETS, default="klein")
    parser.add_argument("--checkpoint", type=Path, help="the embedded one if not said")
    parser.add_argument("--count", type=int, default=200, help="fresh tasks a set")
    parser.add_argument("--only", default="", help="sets whose name contains this")
    args = parser.parse_args()
    # One thread, so that the seconds do not depend on the machine's number of cores.
    torch.set_num_threads(1)
    pipeline = load_pipeline(args.checkpoint or CHECKPOINTS[args.layout])
    print("| set | colour | shape | place | size | background | everything | target | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = {}
    for task_set in SETS[args.layout]:
        if args.only not in task_set.name:
            continue
        rows[task_set.name] = measure(pipeline, task_set, args.count)
        print(format_row(task_set, rows[task_set.name]))
        sys.stdout.flush()
    print(json.dumps({"count": args.count, "sets": rows}))


if __name__ == "__main__":
    main()
