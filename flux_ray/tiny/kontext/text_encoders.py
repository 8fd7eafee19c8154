"""Train CLIP to hold a prompt's parse in its pooled output, and T5 in each hidden state."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from flux_ray.tiny import tasks
from flux_ray.tiny.kontext import models
from flux_ray.tiny.state import Run

RATE = 2e-3
# Padded text length, prompts per batch, and how often this length is chosen.
LENGTHS = ((20, 96, 0.6), (48, 64, 0.25), (128, 28, 0.08), (512, 8, 0.07))


@dataclass(frozen=True)
class TextEncoders:
    """Both text models with their tokenizers."""

    clip: CLIPTextModel
    clip_tokenizer: CLIPTokenizer
    t5: T5EncoderModel
    t5_tokenizer: T5Tokenizer

    @torch.no_grad()
    def embed(self, prompts: list[str], length: int) -> dict[str, torch.Tensor]:
        """Return what the transformer takes, as FluxKontextPipeline makes it.

        `embeds`: fp32 [n, length, 128]; `pooled`: fp32 [n, 128].
        """
        embeds = self.t5(tokenize(self.t5_tokenizer, prompts, length))[0]
        return {"embeds": embeds, "pooled": self.pool(prompts)}

    def pool(self, prompts: list[str]) -> torch.Tensor:
        """Return CLIP's pooled output, [n, 128].

        Padded only to the longest prompt: no token sees those behind it, and the last is pooled.
        """
        pooled: torch.Tensor = self.clip(tokenize(self.clip_tokenizer, prompts)).pooler_output
        return pooled


def tokenize(tokenizer: Any, prompts: list[str], length: int | None = None) -> torch.Tensor:
    """Return the tokens of prompts, int64 [len(prompts), length].

    They are padded or cut to `length`, or else padded to the longest of them.
    """
    padding = "longest" if length is None else "max_length"
    tokens: torch.Tensor = tokenizer(
        prompts, padding=padding, max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens


def train(run: Run, untrained: TextEncoders, *, steps: int) -> None:
    """Train both with the cross-entropy of the ten slots of a prompt's parse.

    T5's are read at the prompt's last token, at a random one of it and at a random pad token: no
    mask hides the padding from the transformer, so that it should hold something useful.
    """
    sizes = [len(choices) for choices in tasks.SLOTS.values()]
    heads = torch.nn.ModuleList([torch.nn.Linear(models.WIDTH, sum(sizes)) for _ in range(2)])
    both = torch.nn.ModuleList([untrained.clip, untrained.t5])
    trained = torch.nn.ModuleList([both, heads])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE, betas=(0.9, 0.98))
    start = run.resume("text_encoders", trained, [optimizer])
    rng = random.Random(11 + start)
    for step in range(start, steps):
        run.set_rate([optimizer], RATE, step, steps, warm_up=100, decay=0.5)
        length, num_prompts, _ = rng.choices(LENGTHS, [weight for *_, weight in LENGTHS])[0]
        batch = [tasks.draw_task(rng, with_pairs=False) for _ in range(num_prompts)]
        parses = torch.tensor([task.parse for task in batch])
        states = read_states(untrained, [task.prompt for task in batch], length)
        loss = parse_loss(heads, states, parses, sizes)
        run.descend(loss, [optimizer], trained.parameters())
        run.report("text_encoders", step, steps, loss.item(), trained, [optimizer])
    run.finish("text_encoders", both)


def read_states(
    encoders: TextEncoders, prompts: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states that should hold the parse: CLIP's [1, n, 128] and T5's [3, n, 128]."""
    pieces = tokenize(encoders.t5_tokenizer, prompts, length)
    states = encoders.t5(pieces)[0]
    rows, last = torch.arange(len(prompts)), (pieces != 0).sum(1) - 1
    any_token = (torch.rand(len(prompts)) * (last + 1)).long()
    pad = last + 1 + (torch.rand(len(prompts)) * (length - 1 - last)).long()
    positions = (last, any_token, pad.clamp(max=length - 1))
    return encoders.pool(prompts)[None], torch.stack([states[rows, p] for p in positions])


def parse_loss(
    heads: torch.nn.ModuleList,
    states: tuple[torch.Tensor, torch.Tensor],
    parses: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:
    """Return the loss, a scalar: summed over the slots, averaged over states and positions.

    `parses`: int64 [n, 10]; `sizes`: the numbers of choices of the slots, whose logits each head
    returns side by side.
    """
    loss = torch.zeros(())
    for head, read in zip(heads, states, strict=True):
        for slot, logits in enumerate(head(read).split(sizes, -1)):
            targets = parses[:, slot].expand(len(read), -1)
            loss = loss + functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss / len(states)
