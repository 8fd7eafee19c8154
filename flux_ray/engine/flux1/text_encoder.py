"""Encode prompts for FLUX.1: the last hidden states of T5, and the pooled output of CLIP."""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5TokenizerFast

from flux_ray.catalog import Tier
from flux_ray.engine.api import Placement, PromptEmbeds
from flux_ray.engine.flux1.checkpoint import open_checkpoint
from flux_ray.engine.loading import fetch, load_text_model, t5
from flux_ray.weights.source import PROMPT_PARTS, WeightSource


class Flux1PromptEncoder:
    """A checkpoint's two text models with their tokenizers.

    T5 may be split over several ranks, which must then all encode the same prompts in the same
    order; CLIP is whole on each of them. Tokens are made here and not by diffusers' pipeline, which
    would log the words that it cuts.
    """

    def __init__(
        self, clip: CLIPTextModel, clip_tokenizer: Any, t5: Any, t5_tokenizer: Any, length: int
    ) -> None:
        self.clip = clip
        self.clip_tokenizer = clip_tokenizer
        self.t5 = t5
        self.t5_tokenizer = t5_tokenizer
        self.length = length

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> PromptEmbeds:
        """Encode a prompt, padded or cut to the tier's text length.

        `embeds`: [1, text_length, T5's width]; `pooled`: [1, CLIP's width]; both in the model's
        dtype.
        """
        words = self.tokens(self.clip_tokenizer, prompt, self.clip_tokenizer.model_max_length)
        pieces = self.tokens(self.t5_tokenizer, prompt, self.length)
        # Without a mask: T5 attends to the padding, which therefore is a part of the prompt.
        tensors = {"embeds": self.t5(pieces)[0], "pooled": self.clip(words).pooler_output}
        return PromptEmbeds(tensors, self.warnings_for(prompt))

    def tokens(self, tokenizer: Any, prompt: str, length: int) -> Tensor:
        """Return the prompt's tokens, padded or cut: int64 [1, length] on the models' device."""
        tokens: Tensor = tokenizer(
            [prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return tokens.to(self.clip.device)

    def warnings_for(self, prompt: str) -> tuple[str, ...]:
        """Return a warning for the caller if T5 does not see the whole prompt.

        CLIP sees only 77 tokens of any prompt; as T5 has the details, that is not worth a warning.
        """
        num_tokens = len(self.t5_tokenizer(prompt).input_ids)
        if num_tokens <= self.length:
            return ()
        return (
            f"the prompt has {num_tokens} tokens, and only the first {self.length} were heeded",
        )


def load_prompt_encoder(weights: str, placement: Placement, tier: Tier) -> Flux1PromptEncoder:
    """Load only the text encoders of a checkpoint, for a process that many replicas share."""
    source, _ = open_checkpoint(tier, weights)
    return load_encoder(source, tier, placement)


def load_encoder(source: WeightSource, tier: Tier, placement: Placement) -> Flux1PromptEncoder:
    """Load CLIP whole, this rank's part of T5, and both tokenizers."""
    folder = fetch(source, PROMPT_PARTS)
    clip = CLIPTextModel.from_pretrained(
        folder / "text_encoder",
        dtype=placement.torch_dtype,
        use_safetensors=True,
        local_files_only=True,
    )
    model = t5(folder / "text_encoder_2")
    return Flux1PromptEncoder(
        clip.to(placement.device).eval(),
        CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        load_text_model(model, folder / model.folder, placement),
        T5TokenizerFast.from_pretrained(folder / "tokenizer_2", local_files_only=True),
        tier.text_length,
    )
