"""Train the tiny transformer by flow matching, in one or several processes of one thread each.

Each process has a pool of tasks whose images are encoded once, at the start. All ranks choose the
same kind of task, canvas and text length for a step, so that their steps take equally long, and
different tasks of that kind.
"""

import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from flux_ray.tiny import tasks, train_vae, world
from flux_ray.tiny.layout import Embedder, Kind, Layout, Noised
from flux_ray.tiny.state import Run
from flux_ray.tiny.tasks import Task
from flux_ray.tiny.world import OTHER_CANVASES, SQUARE, Canvas, Scene

Choice = TypeVar("Choice")
RATE = 2.5e-3
# Parts of the names of modulations (`linear` in FLUX.1's norms) and of the output's matrices.
STARTING_AT_ZERO = ("modulation", ".linear.", "norm_out", "proj_out.weight")
# The tokens of a batch, text and images, whatever its kind, text length or canvas.
NUM_TOKENS = 2400
OTHER_CANVAS_SHARE = 0.2
# The noise levels that the schedulers visit for 64 tokens in 4 steps.
SAMPLER_SIGMAS = (1.0, 0.9547, 0.8754, 0.7007)


@dataclass(frozen=True)
class Entry:
    """A task, with its images as indices into the latents of its canvas in the pool."""

    task: Task
    references: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Pool:
    """The training data of one process.

    `latents`: for each canvas, its images encoded and normalised, fp16 [images, tokens, 32].
    `entries`: the tasks by kind and canvas.
    """

    latents: dict[Canvas, torch.Tensor]
    entries: dict[tuple[Kind, Canvas], list[Entry]]


@dataclass(frozen=True)
class Counts:
    """How many tasks of each kind to make for one canvas; `edits` counts each kind of edit."""

    singles: int
    doubles: int
    edits: int


SQUARE_COUNTS = Counts(singles=1200, doubles=2000, edits=1500)
OTHER_COUNTS = Counts(singles=100, doubles=100, edits=40)
NUM_COMBINATIONS = 400


class Batch:
    """The examples of one step, all of one kind, canvas and text length.

    `answers`: fp32 [n, tokens, 32]; `references`: fp32 [n, references, tokens, 32] or None.
    """

    def __init__(
        self,
        layout: Layout,
        pool: Pool,
        entries: list[Entry],
        canvas: Canvas,
        text_length: int,
        rng: random.Random,
    ) -> None:
        self.canvas = canvas
        self.text_length = text_length
        self.prompts = [draw_prompt(layout, entry, rng) for entry in entries]
        latents = pool.latents[canvas]
        self.answers = latents[[entry.answer for entry in entries]].float()
        self.num_references = len(entries[0].references)
        index = torch.tensor([entry.references for entry in entries])
        self.references = latents[index].float() if self.num_references else None


def train(
    run: Run,
    layout: Layout,
    vae: AutoencoderKL,
    *,
    steps: int,
    pool_scale: float = 1.0,
) -> None:
    """Train the transformer to predict velocities, and save the moving average of its weights.

    Under torchrun the processes average their gradients; rank 0 saves.
    """
    rank, num_ranks = join_processes()
    embedder = layout.load_embedder(run)
    pool = load_pool(run.folder / f"pool-{rank}.pt", layout, vae, seed=100 + rank, scale=pool_scale)
    # The same seed on all ranks, as only gradients are averaged: they start from the same weights,
    # but for the scale of the text embedder, which is measured on each rank's own pool.
    torch.manual_seed(0)
    model = layout.build_transformer()
    init_weights(model, embedding_scale(embedder, pool))
    average = copy.deepcopy(model).eval()
    optimizers = build_optimizers(model)
    start = run.resume("transformer", model, optimizers, average)
    # `shared` gives the same numbers on all ranks, `own` different ones.
    shared, own = random.Random(start), random.Random(start * num_ranks + rank)
    torch.manual_seed(start * num_ranks + rank)
    for step in range(start, steps):
        run.set_rate(optimizers, RATE, step, steps, warm_up=60, decay=0.4)
        batch = draw_batch(layout, pool, shared, own)
        given = embedder.embed(batch.prompts, batch.text_length)
        loss = velocity_loss(layout, model, batch, given)
        run.descend(loss, optimizers, list(model.parameters()), num_ranks=num_ranks)
        update_average(average, model, step)
        if rank == 0:
            run.report("transformer", step, steps, loss.item(), model, optimizers, average)
    if rank == 0:
        run.finish("transformer", average)


def join_processes() -> tuple[int, int]:
    """Join torchrun's processes; return rank and number of processes, (0, 1) without torchrun."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def embedding_scale(embedder: Embedder, pool: Pool) -> float:
    """Return the root mean square of the embeddings of some prompts of the pool."""
    prompts = [entry.task.prompt for entry in pool.entries["text", SQUARE][:64]]
    return float(embedder.embed(prompts, 48)["embeds"].square().mean().sqrt())


def init_weights(model: torch.nn.Module, scale: float) -> None:
    """Initialise all matrices in place: Xavier, with two exceptions.

    Modulation and output start at zero, so that each block begins as the identity. The text
    embedder divides by `scale`, the root mean square of the embeddings.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        torch.nn.init.xavier_uniform_(parameter)
        if any(part in name for part in STARTING_AT_ZERO):
            torch.nn.init.zeros_(parameter)
    # No norm between the text encoder and the blocks would even it out.
    text = model.get_parameter("context_embedder.weight")
    torch.nn.init.normal_(text, std=0.5 / text.shape[1] ** 0.5 / scale)


def build_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return two optimisers: Muon for the matrices of the blocks, AdamW for all else."""
    named = list(model.named_parameters())
    blocks = [p for name, p in named if p.ndim == 2 and "block" in name]
    rest = [p for name, p in named if not (p.ndim == 2 and "block" in name)]
    muon = torch.optim.Muon(blocks, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def draw_batch(layout: Layout, pool: Pool, shared: random.Random, own: random.Random) -> Batch:
    """Return a random batch.

    Kind, canvas and text length come from the generator that is shared by all ranks, the entries
    from this rank's own.
    """
    kind = pick(layout.kinds, shared)
    canvases = [canvas for k, canvas in pool.entries if k == kind and canvas != SQUARE]
    other = shared.random() < OTHER_CANVAS_SHARE and canvases
    canvas = shared.choice(canvases) if other else SQUARE
    text_length = pick(layout.text_lengths, shared)
    entries = pool.entries[kind, canvas]
    num_images = 1 + len(entries[0].references)
    num_tokens = num_images * canvas[0] * canvas[1] // 256 + text_length
    size = max(2, min(24, NUM_TOKENS // num_tokens))
    return Batch(layout, pool, own.choices(entries, k=size), canvas, text_length, own)


def pick(weighted: tuple[tuple[Choice, float], ...], rng: random.Random) -> Choice:
    """Return a random one of choices, each given with its weight."""
    return rng.choices([choice for choice, _ in weighted], [weight for _, weight in weighted])[0]


def draw_prompt(layout: Layout, entry: Entry, rng: random.Random) -> str:
    """Return the prompt of an entry; a caption is worded anew each time, to teach all wordings.

    Some captions are left out, if the layout's pipeline may steer away from an empty prompt.
    """
    if entry.references:
        return entry.task.prompt
    if rng.random() < layout.empty_share:
        return ""
    return tasks.caption(entry.task.answer, rng)


def velocity_loss(
    layout: Layout, model: torch.nn.Module, batch: Batch, given: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the mean squared error of the predicted velocity, which is noise - answer.

    As in the pipelines, the references follow the noisy tokens, without noise, and what is
    predicted for them does not count. `given` is what the embedder made of the prompts.
    """
    answers = batch.answers
    sigmas, noise = draw_sigmas(len(answers)), torch.randn_like(answers)
    mix = sigmas.view(-1, 1, 1)
    tokens = (1 - mix) * answers + mix * noise
    if batch.references is not None:
        tokens = torch.cat([tokens, batch.references.flatten(1, 2)], 1)
    noised = Noised(tokens, sigmas, batch.canvas, batch.num_references)
    # diffusers offers no such attention, so torch's function is replaced for this forward.
    plain = mock.patch("torch.nn.functional.scaled_dot_product_attention", plain_attention)
    with plain, torch.autocast("cpu", torch.bfloat16):
        velocity = layout.velocity(model, noised, given)
    error = velocity[:, : answers.shape[1]].float() - (noise - answers)
    return (error**2).mean()


def draw_sigmas(count: int) -> torch.Tensor:
    """Return `count` random noise levels, fp32 [count].

    Half are exactly those that the sampler visits in 4 steps, so that no distillation is needed for
    these; half are uniform with shift 5, so that other numbers of steps work too.
    """
    uniform = torch.rand(count)
    shifted = 5 * uniform / (1 + 4 * uniform)
    exact = torch.tensor(SAMPLER_SIGMAS)[torch.randint(0, len(SAMPLER_SIGMAS), (count,))]
    return torch.where(torch.rand(count) < 0.5, exact, shifted)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object
) -> torch.Tensor:
    """Compute attention without a fused kernel, on [n, heads, tokens, dim] and without a mask.

    With torch's fused CPU kernel, its backward pass would take half of a training step.
    """
    assert options.get("attn_mask") is None and not options.get("is_causal")
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return torch.softmax(scores, -1).to(value.dtype) @ value


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Update the moving average in place; it is short at first, to forget the random start."""
    decay = min(0.998, (1 + step) / (20 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def load_pool(path: Path, layout: Layout, vae: AutoencoderKL, *, seed: int, scale: float) -> Pool:
    """Return the pool of a process; it is built once, and kept in a file for later starts."""
    if path.exists():
        # Unpickling is safe here: this run wrote the file itself.
        pool: Pool = torch.load(path, weights_only=False)  # nosec B614
        return pool
    pool = build_pool(layout, vae, seed=seed, scale=scale)
    torch.save(pool, path)
    return pool


def build_pool(layout: Layout, vae: AutoencoderKL, *, seed: int, scale: float) -> Pool:
    """Return a pool of random tasks with their images encoded.

    `scale` multiplies the number of tasks; tests use a small one.
    """
    rng = random.Random(seed)
    scenes: dict[Canvas, list[Scene]] = defaultdict(list)
    entries: dict[tuple[Kind, Canvas], list[Entry]] = defaultdict(list)

    def add(canvas: Canvas, scene: Scene) -> int:
        scenes[canvas].append(scene)
        return len(scenes[canvas]) - 1

    kinds = {kind for kind, _ in layout.kinds}
    for kind, canvas, task in draw_tasks(rng, scale):
        if kind not in kinds:
            continue
        references = tuple(add(canvas, scene) for scene in task.references)
        entries[kind, canvas].append(Entry(task, references, add(canvas, task.answer)))
        for index, scene in zip(references, task.references, strict=True):
            # The image of an edit also serves as an image with a caption.
            caption = tasks.draw_caption_task(scene, rng)
            entries["text", canvas].append(Entry(caption, (), index))
    latents = {canvas: encode_scenes(layout, vae, drawn) for canvas, drawn in scenes.items()}
    return Pool(latents, dict(entries))


def draw_tasks(rng: random.Random, scale: float) -> Iterator[tuple[Kind, Canvas, Task]]:
    """Yield random tasks with their kind and canvas, which make about 15,000 images at scale 1."""
    yield from draw_canvas_tasks(rng, SQUARE, SQUARE_COUNTS, scale)
    for canvas in OTHER_CANVASES:
        yield from draw_canvas_tasks(rng, canvas, OTHER_COUNTS, scale)
    for _ in range(int(scale * NUM_COMBINATIONS)):
        yield "combine", SQUARE, tasks.draw_color_of_task(rng)
        yield "combine", SQUARE, tasks.draw_background_of_task(rng)


def draw_canvas_tasks(
    rng: random.Random, canvas: Canvas, counts: Counts, scale: float
) -> Iterator[tuple[Kind, Canvas, Task]]:
    """Yield captions and edits on one canvas."""
    for _ in range(int(scale * counts.singles)):
        scene = world.draw_single(rng, canvas=canvas)
        yield "text", canvas, tasks.draw_caption_task(scene, rng)
    for _ in range(int(scale * counts.doubles)):
        scene = world.draw_double(rng, canvas=canvas)
        yield "text", canvas, tasks.draw_caption_task(scene, rng)
    for _ in range(int(scale * counts.edits)):
        yield "edit", canvas, tasks.draw_recolor_task(rng, canvas=canvas)
        yield "edit", canvas, tasks.draw_background_task(rng, canvas=canvas)


def encode_scenes(layout: Layout, vae: AutoencoderKL, scenes: list[Scene]) -> torch.Tensor:
    """Render and encode scenes of one canvas, fp16 [scenes, tokens, channels], normalised."""
    pixels = torch.from_numpy(np.stack([world.render(scene) for scene in scenes]))
    mean, sigma = layout.statistics(vae)
    patches = (train_vae.encode(vae, pixels.permute(0, 3, 1, 2)) - mean) / sigma
    return patches.flatten(2).transpose(1, 2).half()
