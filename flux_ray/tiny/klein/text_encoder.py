"""Train the tiny text encoder to hold a prompt's parse in its hidden states.

A net of nine layers is trained. `spread` then puts them among identity layers, into a model of 28
layers whose hidden states 9, 18 and 27 are those that the pipeline reads.
"""

import random
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from flux_ray.tiny import tasks
from flux_ray.tiny.klein import models
from flux_ray.tiny.state import Run

# Eight layers are trained. transformers applies the final norm to the last hidden state; with a
# ninth layer that is not the one that is read.
NUM_TRAINED_LAYERS = 9
# The hidden states of the small net that become states 9, 18 and 27 of the 28 layers.
READ_OUT_LAYERS = (2, 5, 8)
# The places of the trained layers among the 28. There is one on both sides of each read-out, so
# that a reader whose layer index is off by one gets other embeddings, and tests notice.
LAYER_SLOTS = (4, 8, 9, 13, 17, 18, 22, 26)
# Padded text length, prompts per batch, and how often this length is chosen.
LENGTHS = ((40, 96, 0.85), (128, 28, 0.08), (512, 8, 0.07))


def train(run: Run, tokenizer: Qwen2Tokenizer, *, steps: int) -> None:
    """Train with the cross-entropy of the ten slots of a prompt's parse.

    They are read at the last token and at one random pad token: the transformer attends to padding
    too, so that it should hold something useful.
    """
    small = models.build_text_encoder(NUM_TRAINED_LAYERS)
    small.config._attn_implementation = "sdpa"
    sizes = [len(choices) for choices in tasks.SLOTS.values()]
    heads = torch.nn.ModuleList(
        [torch.nn.Linear(models.HIDDEN_SIZE, sum(sizes)) for _ in READ_OUT_LAYERS]
    )
    both = torch.nn.ModuleList([small, heads])
    optimizer = torch.optim.AdamW(both.parameters(), lr=2.5e-3, betas=(0.9, 0.98))
    start = run.resume("text_encoders", both, [optimizer])
    # Another seed after a stop: the same one would repeat the prompts from the beginning.
    rng = random.Random(11 + start)
    for step in range(start, steps):
        run.set_rate([optimizer], 2.5e-3, step, steps, warm_up=40, decay=0.5)
        length, num_prompts, _ = rng.choices(LENGTHS, [weight for *_, weight in LENGTHS])[0]
        batch = [tasks.draw_task(rng) for _ in range(num_prompts)]
        ids, mask = models.tokenize(tokenizer, [task.prompt for task in batch], length)
        parses = torch.tensor([task.parse for task in batch])
        loss = parse_loss(small, heads, ids, mask, parses, sizes)
        run.descend(loss, [optimizer], both.parameters())
        run.report("text_encoders", step, steps, loss.item(), both, [optimizer])
    run.finish("text_encoders", small)


def parse_loss(
    small: Qwen3ForCausalLM,
    heads: torch.nn.ModuleList,
    ids: torch.Tensor,
    mask: torch.Tensor,
    parses: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:
    """Return the loss, a scalar: summed over slots, averaged over read-outs and positions.

    `ids` and `mask` are int64 [n, length], `parses` int64 [n, 10]. `sizes` are the numbers of
    choices of the slots, and each head returns the logits of all slots side by side.
    """
    states = small.model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    num_prompts, length = ids.shape
    rows, last = torch.arange(num_prompts), mask.sum(1) - 1
    pad = last + 1 + (torch.rand(num_prompts) * (length - 1 - last)).long()
    positions = (last, pad.clamp(max=length - 1))
    loss = torch.zeros(())
    for head, layer in zip(heads, READ_OUT_LAYERS, strict=True):
        for position in positions:
            logits = head(states[layer][rows, position]).split(sizes, -1)
            for slot, slot_logits in enumerate(logits):
                loss = loss + functional.cross_entropy(slot_logits, parses[:, slot])
    return loss / (len(READ_OUT_LAYERS) * len(positions))


def spread(small: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Return the encoder of 28 layers that has the same hidden states at the read-outs.

    The layers in between become identities: their output projections are zero, so only the residual
    is left. The last one stays random, as nothing reads its output.
    """
    big = models.build_text_encoder(28)
    with torch.no_grad():
        big.model.embed_tokens.weight.copy_(small.model.embed_tokens.weight)
        for index, layer in enumerate(big.model.layers):
            if index in LAYER_SLOTS:
                trained = small.model.layers[LAYER_SLOTS.index(index)]
                layer.load_state_dict(trained.state_dict())
            elif index < models.OUTPUT_LAYERS[-1]:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    big.eval()  # type: ignore[no-untyped-call]
    return big


@dataclass(frozen=True)
class SmallTextEncoder:
    """The net of nine layers, or with other `layers` to read the spread one, and its tokenizer."""

    small: Qwen3ForCausalLM
    tokenizer: Qwen2Tokenizer
    layers: tuple[int, ...] = READ_OUT_LAYERS

    @torch.no_grad()
    def embed(self, prompts: list[str], length: int) -> dict[str, torch.Tensor]:
        """Return prompt embeddings as Flux2KleinPipeline joins them, `embeds`: [n, length, 192]."""
        ids, mask = models.tokenize(self.tokenizer, prompts, length)
        states = self.small.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return {"embeds": torch.cat([states[layer] for layer in self.layers], -1)}
