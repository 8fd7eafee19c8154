"""Encode prompts as embeddings, in a replica's own ranks or in a shared text encoder.

A shared text encoder is another process, so an encoded prompt can also be packed into bytes.
"""

from typing import Any

import torch
from diffusers import Flux2Pipeline
from torch import Tensor

from flux_ray.catalog import Tier
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
    """A family's text model with its tokenizer.

    If the text model is split over several ranks, all of them must encode the same prompts in the
    same order. The diffusers pipeline serves only to format and encode prompts, and so has no other
    parts than these two.
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
        """Encode a prompt, padded or cut to the tier's text length.

        The embeds are [1, text_length, len(family.layers) x hidden_size] in the model's dtype.
        """
        embeds, text_ids = self.pipeline.encode_prompt(
            prompt,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.length,
            text_encoder_out_layers=self.family.layers,
        )
        return PromptEmbeds(embeds, text_ids, self.warnings_for(prompt))

    def warnings_for(self, prompt: str) -> tuple[str, ...]:
        """Return a warning for the caller if the prompt is too long; the pipeline just cuts it."""
        num_tokens = self.family.num_tokens(self.pipeline.tokenizer, prompt)
        if num_tokens <= self.length:
            return ()
        return (
            f"the prompt has {num_tokens} tokens, and only the first {self.length} were heeded",
        )


def load_prompt_encoder(tier: Tier, weights: str | None, placement: Placement) -> PromptEncoder:
    """Load only the tier's text encoder, from the operator's weights or else the catalogue's."""
    family = FAMILIES[tier.family]
    source, _ = open_checkpoint(family, weights_of(tier, weights))
    return load_encoder(family, source, tier, placement)


def load_encoder(
    family: Family, source: WeightSource, tier: Tier, placement: Placement
) -> PromptEncoder:
    """Load the text encoder of a checkpoint, this rank's part of it, and its tokenizer."""
    folder = fetch(source, PROMPT_PARTS)
    component = folder / "text_encoder"
    model = family.text_model(component, max(family.layers))
    text_encoder = load_text_model(model, component, placement)
    tokenizer = family.load_tokenizer(folder / "tokenizer")
    return PromptEncoder(family, text_encoder, tokenizer, tier)


def pack(prompt: PromptEmbeds) -> EncodedPrompt:
    """Return an encoded prompt as plain bytes for another process.

    The positions are not sent: `unpack` computes them from the shape. The bytes are taken as uint8
    because NumPy has no bfloat16.
    """
    embeds = prompt.embeds.cpu().contiguous()
    return EncodedPrompt(
        embeds.view(torch.uint8).numpy().tobytes(),
        tuple(embeds.shape),
        str(embeds.dtype).removeprefix("torch."),
        prompt.warnings,
    )


def unpack(encoded: EncodedPrompt, device: str) -> PromptEmbeds:
    """Return the embeds that were packed, bit for bit, on `device`, with their positions."""
    dtype = getattr(torch, encoded.dtype)
    # A bytearray is a copy: torch warns that a tensor over immutable bytes could be written to.
    embeds = torch.frombuffer(bytearray(encoded.data), dtype=dtype).reshape(encoded.shape)
    text_ids: Tensor = Flux2Pipeline._prepare_text_ids(embeds)
    return PromptEmbeds(embeds.to(device), text_ids.to(device), encoded.warnings)
