"""Prompts to embeddings, inside of a rank group or apart from it."""

from typing import Any

import torch
from diffusers import Flux2Pipeline
from torch import Tensor

from flux_ray.catalog.tiers import Tier
from flux_ray.engine.api import PromptEmbeds
from flux_ray.engine.flux2.dev import DEV
from flux_ray.engine.flux2.family import Family, open_checkpoint
from flux_ray.engine.flux2.klein import KLEIN
from flux_ray.engine.loading import (
    PROMPT_PARTS,
    Placement,
    WeightSource,
    fetch,
    load_text_model,
    weights_of,
)
from flux_ray.request import EncodedPrompt

FAMILIES = {"flux2-klein": KLEIN, "flux2-dev": DEV}


class PromptEncoder:
    """A family's text encoder. The ranks that share one encode the same prompts together.

    The pipeline lends its formatting of the prompt; it has no other part than these two.
    """

    def __init__(self, family: Family, text_encoder: Any, tokenizer: Any, tier: Tier) -> None:
        self.family = family
        self.pipeline = family.pipeline(
            scheduler=None,
            vae=None,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=None,
        )
        self.length = tier.text_length

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """The text model's hidden states for the prompt, padded or cut to the tier's length."""
        embeds, text_ids = self.pipeline.encode_prompt(
            prompt,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.length,
            text_encoder_out_layers=self.family.layers,
        )
        return PromptEmbeds(embeds, text_ids, self.warnings_for(prompt))

    def warnings_for(self, prompt: str) -> tuple[str, ...]:
        """The pipeline cuts a prompt that is too long without a word."""
        num_tokens = self.family.num_tokens(self.pipeline.tokenizer, prompt)
        if num_tokens <= self.length:
            return ()
        return (
            f"the prompt has {num_tokens} tokens, and only the first {self.length} were heeded",
        )


def load_prompt_encoder(tier: Tier, weights: str | None, placement: Placement) -> PromptEncoder:
    """The tier's text encoder alone, from the operator's weights or the catalogue's."""
    family = FAMILIES[tier.family]
    source, _ = open_checkpoint(family, weights_of(tier, weights))
    return load_encoder(family, source, tier, placement)


def load_encoder(
    family: Family, source: WeightSource, tier: Tier, placement: Placement
) -> PromptEncoder:
    """The text encoder of the family's checkpoint."""
    folder = fetch(source, PROMPT_PARTS)
    component = folder / "text_encoder"
    model = family.text_model(component, max(family.layers))
    text_encoder = load_text_model(model, component, placement)
    tokenizer = family.load_tokenizer(folder / "tokenizer")
    return PromptEncoder(family, text_encoder, tokenizer, tier)


def pack(prompt: PromptEmbeds) -> EncodedPrompt:
    """The prompt as bytes, for another process."""
    embeds = prompt.embeds.cpu().contiguous()
    return EncodedPrompt(
        embeds.view(torch.uint8).numpy().tobytes(),
        tuple(embeds.shape),
        str(embeds.dtype).removeprefix("torch."),
        prompt.warnings,
    )


def unpack(encoded: EncodedPrompt, device: str) -> PromptEmbeds:
    """What was packed, bit for bit, on the device."""
    dtype = getattr(torch, encoded.dtype)
    embeds = torch.frombuffer(bytearray(encoded.data), dtype=dtype).reshape(encoded.shape)
    text_ids: Tensor = Flux2Pipeline._prepare_text_ids(embeds)
    return PromptEmbeds(embeds.to(device), text_ids.to(device), encoded.warnings)
