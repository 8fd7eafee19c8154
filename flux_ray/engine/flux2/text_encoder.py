"""Encode prompts as embeddings, in a replica's own ranks or in a shared text encoder."""

from typing import Any

import torch

from flux_ray.catalog import Tier
from flux_ray.engine.api import Placement, PromptEmbeds
from flux_ray.engine.flux2.checkpoint import CheckpointKind, open_checkpoint
from flux_ray.engine.flux2.dev import DEV
from flux_ray.engine.flux2.klein import KLEIN, KLEIN_BASE, KLEIN_KV
from flux_ray.engine.loading import fetch, load_text_model
from flux_ray.weights.source import PROMPT_PARTS, WeightSource

KINDS = {
    "flux2-klein": KLEIN,
    "flux2-klein-base": KLEIN_BASE,
    "flux2-klein-kv": KLEIN_KV,
    "flux2-dev": DEV,
}


class Flux2PromptEncoder:
    """A checkpoint's text model with its tokenizer.

    If the text model is split over several ranks, all of them must encode the same prompts in the
    same order. The diffusers pipeline serves only to format and encode prompts, and so has no other
    parts than these two.
    """

    def __init__(self, kind: CheckpointKind, text_encoder: Any, tokenizer: Any, tier: Tier) -> None:
        self.kind = kind
        self.pipeline = kind.pipeline(
            scheduler=None,
            vae=None,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=None,
        )
        self.length = tier.text_length

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """Encode a prompt, padded or cut to the tier's text length.

        `embeds`: [1, text_length, len(kind.layers) x hidden_size] in the model's dtype; `text_ids`:
        int64 [1, text_length, 4], the positions.
        """
        embeds, text_ids = self.pipeline.encode_prompt(
            prompt,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.length,
            text_encoder_out_layers=self.kind.layers,
        )
        tensors = {"embeds": embeds, "text_ids": text_ids}
        return PromptEmbeds(tensors, self.warnings_for(prompt))

    def warnings_for(self, prompt: str) -> tuple[str, ...]:
        """Return a warning for the caller if the prompt is too long; the pipeline just cuts it."""
        num_tokens = self.kind.num_tokens(self.pipeline.tokenizer, prompt)
        if num_tokens <= self.length:
            return ()
        return (
            f"the prompt has {num_tokens} tokens, and only the first {self.length} were heeded",
        )


def load_prompt_encoder(weights: str, placement: Placement, tier: Tier) -> Flux2PromptEncoder:
    """Load only the text encoder of a checkpoint, for a process that many replicas share."""
    kind = KINDS[tier.family]
    source, _ = open_checkpoint(kind, weights)
    return load_encoder(kind, source, tier, placement)


def load_encoder(
    kind: CheckpointKind, source: WeightSource, tier: Tier, placement: Placement
) -> Flux2PromptEncoder:
    """Load the text encoder of a checkpoint, this rank's part of it, and its tokenizer."""
    folder = fetch(source, PROMPT_PARTS)
    component = folder / "text_encoder"
    model = kind.text_model(component, max(kind.layers))
    text_encoder = load_text_model(model, component, placement)
    tokenizer = kind.load_tokenizer(folder / "tokenizer")
    return Flux2PromptEncoder(kind, text_encoder, tokenizer, tier)
