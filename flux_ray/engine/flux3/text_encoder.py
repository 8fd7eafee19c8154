"""Encode prompts as embeddings, in a replica's own ranks or in a shared text encoder.

The embeddings are eight hidden states of Qwen3-VL's language model. A prompt is padded to the next
multiple of 80 tokens, and not to one length: the transformer attends to the padding.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLTextModel

from flux_ray.catalog import Tier
from flux_ray.engine.api import Placement, PromptEmbeds, TextModel
from flux_ray.engine.flux3.checkpoint import KINDS, open_checkpoint
from flux_ray.engine.loading import fetch, first_layers, load_text_model
from flux_ray.weights.source import PROMPT_PARTS, WeightSource

LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)
PAD_MULTIPLE = 80
# The position of every pad. transformers 5 would give them 0, and the model was trained with 1.
PAD_POSITION = 1
# transformers has a plan for Qwen3, which has the same layers, but none for Qwen3-VL.
QWEN3_VL_PLAN = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


def qwen3_vl(folder: Path) -> TextModel:
    """Return the language model of the Qwen3-VL in `folder`, cut to the layers that are read."""
    config: Any = Qwen3VLConfig.from_pretrained(folder)
    return language_model(config.text_config)


def language_model(config: Qwen3VLTextConfig) -> TextModel:
    """Return the layers that are read of a Qwen3-VL, without its vision tower."""
    return replace(first_layers(Qwen3VLTextModel, config, max(LAYERS)), plan=QWEN3_VL_PLAN)


class Flux3PromptEncoder:
    """A checkpoint's language model with its tokenizer.

    If the model is split over several ranks, all of them must encode the same prompts in the same
    order.
    """

    def __init__(self, text_encoder: Any, tokenizer: Any, tier: Tier) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.length = tier.text_length

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """Encode a prompt, cut to the tier's text length and padded to a multiple of 80 tokens.

        `embeds`: [1, tokens, 8 x hidden_size] in the model's dtype.
        """
        ids, num_tokens = self.tokens_of(prompt)
        num_kept = min(num_tokens, self.length)
        device = self.text_encoder.device
        mask = (torch.arange(ids.shape[1], device=device) < num_kept).long()[None]
        positions = torch.arange(ids.shape[1], device=device)[None]
        states = self.text_encoder(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=positions.masked_fill(mask == 0, PAD_POSITION),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        # [1, tokens, layers, hidden_size]: of each token, one layer after the other.
        embeds = torch.stack([states[layer] for layer in LAYERS], dim=2).flatten(2)
        return PromptEmbeds({"embeds": embeds}, self.warnings_for(num_tokens))

    def tokens_of(self, prompt: str) -> tuple[Tensor, int]:
        """Return the ids of the prompt in its chat template, padded, and the number before a cut.

        The ids are int64 [1, tokens].
        """
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text)["input_ids"]
        padded = min(math.ceil(len(ids) / PAD_MULTIPLE) * PAD_MULTIPLE, self.length)
        pads = [self.tokenizer.pad_token_id] * (padded - len(ids))
        return torch.tensor([ids[:padded] + pads]), len(ids)

    def warnings_for(self, num_tokens: int) -> tuple[str, ...]:
        """Return a warning for the caller if the prompt is too long and was cut."""
        if num_tokens <= self.length:
            return ()
        return (
            f"the prompt has {num_tokens} tokens, and only the first {self.length} were heeded",
        )


def load_prompt_encoder(weights: str, placement: Placement, tier: Tier) -> Flux3PromptEncoder:
    """Load only the text encoder of a checkpoint, for a process that many replicas share."""
    source, _ = open_checkpoint(KINDS[tier.family], weights)
    return load_encoder(source, tier, placement)


def load_encoder(source: WeightSource, tier: Tier, placement: Placement) -> Flux3PromptEncoder:
    """Load the text encoder of a checkpoint, this rank's part of it, and its tokenizer."""
    folder = fetch(source, PROMPT_PARTS)
    component = folder / "text_encoder"
    text_encoder = load_text_model(qwen3_vl(component), component, placement)
    return Flux3PromptEncoder(text_encoder, load_tokenizer(folder / "tokenizer"), tier)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that is inside the processor named by the checkpoint.

    The processor itself needs torchvision, for images that it never gets here. Raise ValueError if
    there is no chat template, which every prompt goes through.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {folder} has no chat template")
    return tokenizer
