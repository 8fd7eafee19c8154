"""Train the tiny transformer by flow matching, on one or several processes of one thread each.

Training data for the transformer: tasks of every kind with their pictures as latents.
"""

import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from flux_ray.tiny import models, tasks, train_text_encoder, train_vae, world
from flux_ray.tiny.state import Run
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


RATE = 2.5e-3
# Batches hold about as many tokens whatever their kind, text length or canvas.
NUM_TOKENS = 2400
KINDS: tuple[tuple[Kind, float], ...] = (("text", 0.45), ("edit", 0.4), ("combine", 0.15))
# Padded text lengths; 512 is the pipeline's default, always padded and never masked.
TEXT_LENGTHS = ((32, 0.45), (48, 0.4), (128, 0.1), (512, 0.05))
OTHER_CANVAS_SHARE = 0.2
# What klein's schedule visits with 64 tokens and 4 steps.
SAMPLER_SIGMAS = (1.0, 0.9547, 0.8754, 0.7007)


def train(
    run: Run,
    *,
    vae: AutoencoderKLFlux2,
    text_encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    steps: int,
    pool_scale: float = 1.0,
) -> None:
    """Minimise the error of the velocity; keep the moving average of the weights.

    Under torchrun the processes average their gradients; each has a pool of its own.
    """
    rank, num_ranks = join_processes()
    pool = load_pool(run.folder / f"pool-{rank}.pt", vae, seed=100 + rank, scale=pool_scale)
    torch.manual_seed(0)
    model = models.build_transformer()
    init_weights(model, embedding_scale(text_encoder, tokenizer, pool))
    average = copy.deepcopy(model).eval()
    optimizers = build_optimizers(model)
    start = run.resume("transformer", model, optimizers, average)
    # The ranks agree on what a step is about, and differ in what they draw for it.
    shared, own = random.Random(start), random.Random(start * num_ranks + rank)
    torch.manual_seed(start * num_ranks + rank)
    for step in range(start, steps):
        run.set_rate(optimizers, RATE, step, steps, warm_up=60, decay=0.4)
        batch = draw_batch(pool, shared, own)
        embeds = train_text_encoder.embed(text_encoder, tokenizer, batch.prompts, batch.text_length)
        loss = velocity_loss(model, batch, embeds)
        run.descend(loss, optimizers, list(model.parameters()), num_ranks=num_ranks)
        update_average(average, model, step)
        if rank == 0:
            run.report("transformer", step, steps, loss.item(), model, optimizers, average)
    if rank == 0:
        run.finish("transformer", average)


def join_processes() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) without torchrun."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object
) -> torch.Tensor:
    """Attention spelt out, [n, heads, tokens, dim], for a model that masks nothing.

    The CPU's fused kernel spends half of a training step in its backward pass at these sizes.
    """
    assert options.get("attn_mask") is None and not options.get("is_causal")
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return torch.softmax(scores, -1).to(value.dtype) @ value


def embedding_scale(text_encoder: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, pool: Pool) -> float:
    """Root mean square of prompt embeddings."""
    prompts = [entry.task.prompt for entry in pool.entries["text", SQUARE][:64]]
    embeds = train_text_encoder.embed(text_encoder, tokenizer, prompts, 48)
    return float(embeds.square().mean().sqrt())


def init_weights(model: Flux2Transformer2DModel, scale: float) -> None:
    """Xavier; zero where the residual branches open; the text embedder undoes the scale."""
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        torch.nn.init.xavier_uniform_(parameter)
        if "modulation" in name or "norm_out" in name or name == "proj_out.weight":
            torch.nn.init.zeros_(parameter)
    # There is no norm between the text encoder and the blocks.
    width = model.context_embedder.weight.shape[1]
    torch.nn.init.normal_(model.context_embedder.weight, std=0.5 / width**0.5 / scale)


def build_optimizers(model: Flux2Transformer2DModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    named = list(model.named_parameters())
    blocks = [p for name, p in named if p.ndim == 2 and "block" in name]
    rest = [p for name, p in named if not (p.ndim == 2 and "block" in name)]
    muon = torch.optim.Muon(blocks, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]


class Batch:
    """One step's examples, all of one kind, canvas and text length."""

    def __init__(
        self, pool: Pool, entries: list[Entry], canvas: Canvas, text_length: int, rng: random.Random
    ) -> None:
        self.canvas = canvas
        self.text_length = text_length
        self.prompts = [draw_prompt(entry, rng) for entry in entries]
        latents = pool.latents[canvas]
        self.answers = latents[[entry.answer for entry in entries]].float()
        self.num_references = len(entries[0].references)
        index = torch.tensor([entry.references for entry in entries])
        self.references = latents[index].float() if self.num_references else None


def draw_prompt(entry: Entry, rng: random.Random) -> str:
    """A caption is said anew each time; other prompts stay."""
    if entry.references:
        return entry.task.prompt
    return tasks.caption(entry.task.answer, rng)


def draw_batch(pool: Pool, shared: random.Random, own: random.Random) -> Batch:
    """Kind, canvas and text length from the shared generator, entries from the rank's own."""
    kind = shared.choices([k for k, _ in KINDS], [weight for _, weight in KINDS])[0]
    canvases = [canvas for k, canvas in pool.entries if k == kind and canvas != SQUARE]
    other = shared.random() < OTHER_CANVAS_SHARE and canvases
    canvas = shared.choice(canvases) if other else SQUARE
    text_length = shared.choices(
        [length for length, _ in TEXT_LENGTHS], [weight for _, weight in TEXT_LENGTHS]
    )[0]
    entries = pool.entries[kind, canvas]
    num_images = 1 + len(entries[0].references)
    num_tokens = num_images * canvas[0] * canvas[1] // 256 + text_length
    size = max(2, min(24, NUM_TOKENS // num_tokens))
    return Batch(pool, own.choices(entries, k=size), canvas, text_length, own)


def draw_sigmas(count: int) -> torch.Tensor:
    """Half exactly the sampler's, half uniform with shift 5: no distillation is needed."""
    uniform = torch.rand(count)
    shifted = 5 * uniform / (1 + 4 * uniform)
    exact = torch.tensor(SAMPLER_SIGMAS)[torch.randint(0, len(SAMPLER_SIGMAS), (count,))]
    return torch.where(torch.rand(count) < 0.5, exact, shifted)


def position_ids(canvas: Canvas, num_references: int) -> torch.Tensor:
    """FLUX.2's (t, h, w, l) of the answer (t = 0) and the references (t = 10, 20)."""
    rows, columns = torch.arange(canvas[1] // 16), torch.arange(canvas[0] // 16)
    grids = [
        torch.cartesian_prod(torch.tensor([10 * index]), rows, columns, torch.arange(1))
        for index in range(num_references + 1)
    ]
    return torch.cat(grids)


def velocity_loss(
    model: Flux2Transformer2DModel, batch: Batch, embeds: torch.Tensor
) -> torch.Tensor:
    """MSE of the predicted noise - answer; references stand clean behind the noisy tokens."""
    answers = batch.answers
    sigmas, noise = draw_sigmas(len(answers)), torch.randn_like(answers)
    mix = sigmas.view(-1, 1, 1)
    tokens = (1 - mix) * answers + mix * noise
    if batch.references is not None:
        tokens = torch.cat([tokens, batch.references.flatten(1, 2)], 1)
    one = torch.arange(1)
    plain = mock.patch("torch.nn.functional.scaled_dot_product_attention", plain_attention)
    with plain, torch.autocast("cpu", torch.bfloat16):
        velocity = model(
            hidden_states=tokens,
            encoder_hidden_states=embeds,
            timestep=sigmas,
            img_ids=position_ids(batch.canvas, batch.num_references),
            txt_ids=torch.cartesian_prod(one, one, one, torch.arange(embeds.shape[1])),
            return_dict=False,
        )[0]
    error = velocity[:, : answers.shape[1]].float() - (noise - answers)
    return cast(torch.Tensor, (error**2).mean())


@torch.no_grad()
def update_average(
    average: Flux2Transformer2DModel, model: Flux2Transformer2DModel, step: int
) -> None:
    """Exponential moving average, short at first."""
    decay = min(0.998, (1 + step) / (20 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
