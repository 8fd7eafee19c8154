"""Ulysses sequence parallel: ranks share the tokens, and inside attention the heads.

Between blocks every rank has an equal part of the text and of the image tokens; an all-to-all
before attention gives it all tokens of some heads, one after it turns that back (DeepSpeed Ulysses,
arXiv 2309.14509). Parts are equal because both streams are padded; the pads never enter attention.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flux_ray.parallel.mesh import Axis

Attention = Callable[..., Tensor]


def num_padded(num_tokens: int, num_ranks: int) -> int:
    """The next multiple."""
    return -(-num_tokens // num_ranks) * num_ranks


def local_part(tokens: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's part along `dim`, of zero-padded tokens."""
    padded = num_padded(tokens.shape[dim], axis.size)
    pad = tokens.new_zeros(
        *tokens.shape[:dim], padded - tokens.shape[dim], *tokens.shape[dim + 1 :]
    )
    part: Tensor = torch.cat([tokens, pad], dim).chunk(axis.size, dim)[axis.rank]
    return part.contiguous()


def gather_parts(part: Tensor, num_tokens: int, axis: Axis) -> Tensor:
    """The whole of what `own_part` cut along dimension 1: [batch, num_tokens, channels]."""
    parts = [torch.empty_like(part) for _ in range(axis.size)]
    dist.all_gather(parts, part.contiguous(), group=axis.group)
    return torch.cat(parts, 1)[:, :num_tokens]


def real_tokens(num_text: int, num_image: int, num_ranks: int) -> Tensor | None:
    """Where the tokens that are no pads stand in the joint sequence; None if there are no pads.

    The joint sequence is [text part, image part] of rank 0, then of rank 1, and so on.
    """
    streams = []
    for num_tokens in (num_text, num_image):
        padded = num_padded(num_tokens, num_ranks)
        streams.append((torch.arange(padded) < num_tokens).view(num_ranks, -1))
    is_real = torch.cat(streams, 1).flatten()
    return None if bool(is_real.all()) else is_real.nonzero().flatten()


class Ulysses:
    """One model's exchanges. `enter` and `leave` are hooks on the model, `attend` its attention."""

    def __init__(self, axis: Axis, attention: Attention) -> None:
        self.axis = axis
        self.attention = attention
        self._keep: Tensor | None = None
        self._num_text = 0
        self._num_image = 0

    def enter(
        self, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut the model's inputs to this rank's tokens. They come by name."""
        assert not args, "a sequence-parallel model takes keyword arguments"
        image, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        self._look_at(text.shape[1], image.shape[1], image.device)
        cut = {name: local_part(inputs[name], 1, self.axis) for name in TOKENS}
        ids = {name: local_part(inputs[name], inputs[name].ndim - 2, self.axis) for name in IDS}
        return args, inputs | cut | ids

    def _look_at(self, num_text: int, num_image: int, device: torch.device) -> None:
        """Find the pads, unless the step before had as many tokens: a copy that a device waits for.

        Steps of one image follow each other.
        """
        if (num_text, num_image) == (self._num_text, self._num_image):
            return
        keep = real_tokens(num_text, num_image, self.axis.size)
        self._keep = None if keep is None else keep.to(device)
        self._num_text, self._num_image = num_text, num_image

    def leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The image tokens of all ranks, without pads."""
        if isinstance(output, tuple):
            return gather_parts(output[0], self._num_image, self.axis), *output[1:]
        output.sample = gather_parts(output.sample, self._num_image, self.axis)
        return output

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any
    ) -> Tensor:
        """Attention over the tokens of all ranks.

        In and out: [batch, this rank's tokens, heads, head_dim].
        """
        if attn_mask is not None:
            raise ValueError("sequence parallel attention takes no mask")
        num_parts = self.axis.size
        joint = torch.stack([query, key, value])
        # [ranks, tokens, 3, batch, heads / ranks, head_dim]: to each rank its heads.
        sent = torch.unflatten(joint, 3, (num_parts, -1)).permute(3, 2, 0, 1, 4, 5).contiguous()
        received = self._exchange(sent).flatten(0, 1)
        real = received if self._keep is None else received[self._keep]
        # [tokens, 3, batch, heads, head_dim] to three of [batch, tokens, heads, head_dim].
        query, key, value = real.permute(1, 2, 0, 3, 4).unbind(0)
        attended = self.attention(query, key, value, **options).permute(1, 0, 2, 3)
        if self._keep is not None:
            padded = attended.new_zeros(received.shape[0], *attended.shape[1:])
            attended = padded.index_copy(0, self._keep, attended)
        # [ranks, tokens, batch, heads / ranks, head_dim]: to each rank its tokens.
        back = self._exchange(torch.unflatten(attended, 0, (num_parts, -1)).contiguous())
        return back.permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _exchange(self, sent: Tensor) -> Tensor:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.axis.group)
        return received


TOKENS = ("hidden_states", "encoder_hidden_states")
# Position ids, or what an engine made of them: along the last but one dimension are tokens.
IDS = ("img_ids", "txt_ids")


def split_sequence(model: nn.Module, axis: Axis) -> None:
    """Make a diffusers transformer with joint attention share its tokens over `axis`.

    Its processors stay diffusers' own: their code runs with our attention for diffusers'
    `dispatch_attention_fn`, so that any family works and nothing is copied.
    """
    if axis.size == 1:
        return
    ulysses: Ulysses | None = None
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is None:
            continue
        stock = type(processor).__call__
        ulysses = ulysses or Ulysses(axis, stock.__globals__["dispatch_attention_fn"])
        module.processor = with_attention(processor, stock, ulysses.attend)
    if ulysses is None:
        raise ValueError(f"{type(model).__name__} has no attention processors to split")
    model.register_forward_pre_hook(ulysses.enter, with_kwargs=True)
    model.register_forward_hook(ulysses.leave)


def with_attention(processor: Any, stock: Any, attend: Attention) -> Any:
    """A processor that differs from `processor` only in the attention function that it calls."""
    names = stock.__globals__ | {"dispatch_attention_fn": attend}
    call = types.FunctionType(
        stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__
    )
    call.__kwdefaults__ = stock.__kwdefaults__
    kind = type(processor)
    return type(kind.__name__, (kind,), {"__call__": call})()


def check_heads(num_heads: int, tensor: int, sequence: int) -> None:
    """Refuse a split that would cut a head. ValueError names the parameter."""
    if num_heads % tensor:
        raise ValueError(f"parallel.tensor {tensor} does not divide the {num_heads} heads")
    if num_heads // tensor % sequence:
        raise ValueError(
            f"parallel.sequence {sequence} does not divide the {num_heads // tensor} heads that"
            f" each rank has at parallel.tensor {tensor}"
        )
