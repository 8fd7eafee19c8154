"""Training data for the transformer: tasks of every kind with their pictures as latents."""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2

from flux_ray.tiny import tasks, train_vae, world
from flux_ray.tiny.tasks import Task
from flux_ray.tiny.world import OTHER_CANVASES, SQUARE, Canvas, Scene

Kind = Literal["text", "edit", "combine"]


@dataclass(frozen=True)
class Entry:
    """A task whose pictures are rows of the latents of its canvas."""

    task: Task
    references: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Pool:
    """`latents` per canvas: normalised fp16 [pictures, tokens, 32]; entries by kind and canvas."""

    latents: dict[Canvas, torch.Tensor]
    entries: dict[tuple[Kind, Canvas], list[Entry]]


@dataclass(frozen=True)
class Counts:
    """Tasks to draw on one canvas; `edits` of each kind."""

    singles: int
    doubles: int
    edits: int


SQUARE_COUNTS = Counts(singles=1200, doubles=2000, edits=1500)
OTHER_COUNTS = Counts(singles=100, doubles=100, edits=40)
NUM_COMBINATIONS = 400


def draw_tasks(rng: random.Random, scale: float) -> Iterator[tuple[Kind, Canvas, Task]]:
    """About 15,000 pictures' worth of tasks at scale 1."""
    yield from draw_canvas_tasks(rng, SQUARE, SQUARE_COUNTS, scale)
    for canvas in OTHER_CANVASES:
        yield from draw_canvas_tasks(rng, canvas, OTHER_COUNTS, scale)
    for _ in range(int(scale * NUM_COMBINATIONS)):
        yield "combine", SQUARE, tasks.draw_color_of_task(rng)
        yield "combine", SQUARE, tasks.draw_background_of_task(rng)


def draw_canvas_tasks(
    rng: random.Random, canvas: Canvas, counts: Counts, scale: float
) -> Iterator[tuple[Kind, Canvas, Task]]:
    """Captions and edits of one size."""
    for _ in range(int(scale * counts.singles)):
        scene = world.draw_single(rng, canvas=canvas)
        yield "text", canvas, tasks.draw_caption_task(scene, rng)
    for _ in range(int(scale * counts.doubles)):
        scene = world.draw_double(rng, canvas=canvas)
        yield "text", canvas, tasks.draw_caption_task(scene, rng)
    for _ in range(int(scale * counts.edits)):
        yield "edit", canvas, tasks.draw_recolor_task(rng, canvas=canvas)
        yield "edit", canvas, tasks.draw_background_task(rng, canvas=canvas)


def build_pool(vae: AutoencoderKLFlux2, *, seed: int, scale: float) -> Pool:
    """Draw the tasks and encode their pictures."""
    rng = random.Random(seed)
    scenes: dict[Canvas, list[Scene]] = defaultdict(list)
    entries: dict[tuple[Kind, Canvas], list[Entry]] = defaultdict(list)

    def add(canvas: Canvas, scene: Scene) -> int:
        scenes[canvas].append(scene)
        return len(scenes[canvas]) - 1

    for kind, canvas, task in draw_tasks(rng, scale):
        references = tuple(add(canvas, scene) for scene in task.references)
        entries[kind, canvas].append(Entry(task, references, add(canvas, task.answer)))
        for index, scene in zip(references, task.references, strict=True):
            # The picture of an edit is also a picture with a caption.
            caption = tasks.draw_caption_task(scene, rng)
            entries["text", canvas].append(Entry(caption, (), index))
    latents = {canvas: encode_scenes(vae, drawn) for canvas, drawn in scenes.items()}
    return Pool(latents, dict(entries))


def encode_scenes(vae: AutoencoderKLFlux2, scenes: list[Scene]) -> torch.Tensor:
    """Normalised tokens of the scenes' pictures, fp16 [scenes, tokens, 32]."""
    batches = [scenes[i : i + 32] for i in range(0, len(scenes), 32)]
    return torch.cat([encode_images(vae, [world.render(s) for s in batch]) for batch in batches])


def encode_images(vae: AutoencoderKLFlux2, images: list[world.Pixels]) -> torch.Tensor:
    """uint8 [height, width, 3] each, to normalised tokens fp16 [n, tokens, 32]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    patches = train_vae.encode(vae, pixels)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    sigma = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
    tokens: torch.Tensor = ((patches - mean) / sigma).flatten(2).transpose(1, 2)
    return tokens.half()


def load_pool(path: Path, vae: AutoencoderKLFlux2, *, seed: int, scale: float) -> Pool:
    """The pool of a training process, built once and kept beside the run."""
    if path.exists():
        # This run wrote it.
        pool: Pool = torch.load(path, weights_only=False)  # nosec B614
        return pool
    pool = build_pool(vae, seed=seed, scale=scale)
    torch.save(pool, path)
    return pool
