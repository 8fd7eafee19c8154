"""FLUX.2 klein KV: keys and values of references are computed once, and kept.

In this model references attend only to each other, and always as at timestep 0. So their keys and
values depend on nothing but the references and the weights. Flux2KleinKVPipeline takes them from
the first step of each image; here a forward of the references alone computes the same bits when
they are encoded. The encoding cache keeps them for requests with other prompts, seeds and sizes,
and no step has the references among its tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from flux_ray.catalog import Tier
from flux_ray.engine.api import Conditioning, ImageState, Placement, PromptEmbeds
from flux_ray.engine.flux2.pipeline import Flux2
from flux_ray.parallel.sequence import attention_of, replace_attention
from flux_ray.request import RgbImage

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ReferenceKeys:
    """The attention of a transformer, which keeps keys and values or adds kept ones to its own.

    The adapter says which of both before a forward. Layers are told apart by the order in which
    they call, because a rank makes one forward at a time. Under tensor or sequence parallel, keys
    and values are those of the heads that this rank attends with, for all tokens.
    """

    def __init__(self) -> None:
        self._attention: Callable[..., Tensor] | None = None
        self._change: Change | None = None

    def install(self, transformer: nn.Module) -> None:
        """Take the place of the transformer's attention; sequence parallel then wraps this one."""
        self._attention = attention_of(transformer)
        replace_attention(transformer, self.attend)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Compute attention; each tensor is [batch, tokens, heads, head_dim]."""
        assert self._attention is not None, "attention before it is installed"
        if self._change is not None:
            key, value = self._change(key, value)
        return self._attention(query, key, value, **options)

    @contextmanager
    def recorded(self) -> Iterator[dict[str, Tensor]]:
        """Yield a dictionary, which forwards inside of it fill with each layer's keys and values.

        They are [batch, tokens, heads, head_dim], named `key_0`, `value_0`, `key_1` and so on.
        """
        kept: dict[str, Tensor] = {}

        def record(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            layer = len(kept) // 2
            # A view would keep the whole projection that it is of.
            kept[f"key_{layer}"], kept[f"value_{layer}"] = key.contiguous(), value.contiguous()
            return key, value

        with self._changed(record):
            yield kept

    @contextmanager
    def inserted(self, kept: Mapping[str, Tensor], num_text: int) -> Iterator[None]:
        """Let the forward inside of it attend to the kept keys and values as well.

        They stand behind the `num_text` tokens of the text, where the pipeline has them: attention
        is the same wherever they are, but for the last bit.
        """
        layers = iter(range(len(kept) // 2))

        def joined(own: Tensor, more: Tensor) -> Tensor:
            return torch.cat([own[:, :num_text], more, own[:, num_text:]], dim=1)

        def insert(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            layer = next(layers)
            return joined(key, kept[f"key_{layer}"]), joined(value, kept[f"value_{layer}"])

        with self._changed(insert):
            yield

    @contextmanager
    def _changed(self, change: Change) -> Iterator[None]:
        self._change = change
        try:
            yield
        finally:
            self._change = None


class Flux2KleinKv(Flux2):
    """The stages of a klein KV; references are encoded to keys and values, not to latents.

    All ranks of a replica must encode the same references together, like prompts.
    """

    keys: ReferenceKeys

    @classmethod
    def load(cls, weights: str, placement: Placement, tier: Tier) -> Self:
        """Load the adapter of a checkpoint, as Flux2.load does."""
        keys = ReferenceKeys()
        adapter = cls.load_changed(weights, placement, tier, keys.install)
        adapter.keys = keys
        return adapter

    @torch.inference_mode()
    def encode(self, prompt: PromptEmbeds, references: tuple[RgbImage, ...]) -> Conditioning:
        """Return the prompt joined with the references' keys and values in each layer."""
        given = super().encode(prompt, references)
        if not references:
            return given
        latents, ids = given.references["latents"], given.references["ids"]
        table = self.rotary.table(ids)
        embeds = prompt.tensors["embeds"]
        with self.keys.recorded() as kept:
            self.pipeline.transformer(
                hidden_states=latents.to(embeds.dtype),
                timestep=torch.zeros(1, dtype=embeds.dtype, device=self.device),
                # References do not see the text, and so are computed without one.
                encoder_hidden_states=embeds[:, :0],
                txt_ids=table[:, :0],
                img_ids=table,
                return_dict=False,
            )
        return replace(given, references=kept)

    def predict(self, state: ImageState, prompt: PromptEmbeds, text_rotary: Tensor) -> Tensor:
        """Return the transformer's prediction for the image's tokens, [1, tokens, channels]."""
        kept = state.conditioning.references
        if not kept:
            return super().predict(state, prompt, text_rotary)
        with self.keys.inserted(kept, prompt.tensors["embeds"].shape[1]):
            return super().predict(state, prompt, text_rotary)
