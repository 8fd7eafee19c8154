"""Ulysses sequence parallel: ranks split the tokens and, inside attention, the heads.

Between blocks each rank has an equal part of the text tokens and of the image tokens. Before
attention an all-to-all gives it all tokens of some of the heads, and after attention another one
undoes that (DeepSpeed Ulysses, arXiv 2309.14509). Text and image are padded to make the parts
equal; the padding is left out of attention.
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
    """Return `num_tokens` rounded up to a multiple of `num_ranks`."""
    return -(-num_tokens // num_ranks) * num_ranks


def local_part(tokens: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return this rank's part of a tensor along `dim`, after padding it with zeros.

    The part is contiguous, has the same dtype, and is equally large on all ranks.
    """
    padded = num_padded(tokens.shape[dim], axis.size)
    pad = tokens.new_zeros(
        *tokens.shape[:dim], padded - tokens.shape[dim], *tokens.shape[dim + 1 :]
    )
    part: Tensor = torch.cat([tokens, pad], dim).chunk(axis.size, dim)[axis.rank]
    return part.contiguous()


def gather_parts(part: Tensor, num_tokens: int, axis: Axis) -> Tensor:
    """Return the whole of what `local_part` cut along dimension 1, without the padding.

    `part` is [batch, tokens of this rank, channels], the result [batch, num_tokens, channels]. All
    ranks must call it together.
    """
    parts = [torch.empty_like(part) for _ in range(axis.size)]
    dist.all_gather(parts, part.contiguous(), group=axis.group)
    return torch.cat(parts, 1)[:, :num_tokens]


def real_tokens(num_text: int, num_image: int, num_ranks: int) -> Tensor | None:
    """Return the positions in the joint sequence that are not padding, int64 [tokens].

    The joint sequence is [text part, image part] of rank 0, then of rank 1, and so on. Return None
    if there is no padding at all, so that attention can skip the selection.
    """
    streams = []
    for num_tokens in (num_text, num_image):
        padded = num_padded(num_tokens, num_ranks)
        streams.append((torch.arange(padded) < num_tokens).view(num_ranks, padded // num_ranks))
    is_real = torch.cat(streams, 1).flatten()
    return None if bool(is_real.all()) else is_real.nonzero().flatten()


class Ulysses:
    """The sequence parallel of one model: two hooks on its forward, and its attention function.

    `enter` cuts the model's inputs to this rank's tokens, `leave` gathers its outputs, and `attend`
    takes the place of attention in between. All ranks run the same forward at the same time.
    """

    def __init__(self, axis: Axis, attention: Attention) -> None:
        self.axis = axis
        self.attention = attention
        self._keep: Tensor | None = None
        self._num_text = 0
        self._num_image = 0

    def enter(
        self, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut the inputs of a forward, which come by name, to this rank's tokens.

        Tokens are [batch, tokens, channels]; position ids or tables are [..., tokens, channels].
        """
        assert not args, "a sequence-parallel model takes keyword arguments"
        image, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        self._look_at(text.shape[1], image.shape[1], image.device)
        cut = {name: local_part(inputs[name], 1, self.axis) for name in TOKENS}
        ids = {name: local_part(inputs[name], inputs[name].ndim - 2, self.axis) for name in IDS}
        return args, inputs | cut | ids

    def _look_at(self, num_text: int, num_image: int, device: torch.device) -> None:
        """Find the padding, unless the forward before had as many tokens.

        Finding it copies positions to the device, which stalls it. Steps of one image mostly follow
        each other, so that it happens once per image.
        """
        if (num_text, num_image) == (self._num_text, self._num_image):
            return
        keep = real_tokens(num_text, num_image, self.axis.size)
        self._keep = None if keep is None else keep.to(device)
        self._num_text, self._num_image = num_text, num_image

    def leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output with the image tokens of all ranks, [batch, tokens, channels]."""
        if isinstance(output, tuple):
            return gather_parts(output[0], self._num_image, self.axis), *output[1:]
        output.sample = gather_parts(output.sample, self._num_image, self.axis)
        return output

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any
    ) -> Tensor:
        """Compute attention over the tokens of all ranks.

        Query, key, value and result are [batch, tokens of this rank, heads, head_dim]. Raise
        ValueError for a mask, which would have to be cut and padded too.
        """
        if attn_mask is not None:
            raise ValueError("sequence parallel attention takes no mask")
        num_parts = self.axis.size
        # Stacked, because one exchange is faster than three.
        joint = torch.stack([query, key, value])
        # [ranks, tokens, 3, batch, heads / ranks, head_dim]: each rank is sent its heads.
        sent = torch.unflatten(joint, 3, (num_parts, -1)).permute(3, 2, 0, 1, 4, 5).contiguous()
        received = self._exchange(sent).flatten(0, 1)
        real = received if self._keep is None else received[self._keep]
        # [tokens, 3, batch, heads, head_dim] to three of [batch, tokens, heads, head_dim].
        query, key, value = real.permute(1, 2, 0, 3, 4).unbind(0)
        attended = self.attention(query, key, value, **options).permute(1, 0, 2, 3)
        if self._keep is not None:
            padded = attended.new_zeros(received.shape[0], *attended.shape[1:])
            attended = padded.index_copy(0, self._keep, attended)
        # [ranks, tokens, batch, heads / ranks, head_dim]: each rank is sent its tokens.
        back = self._exchange(torch.unflatten(attended, 0, (num_parts, -1)).contiguous())
        return back.permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _exchange(self, sent: Tensor) -> Tensor:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.axis.group)
        return received


TOKENS = ("hidden_states", "encoder_hidden_states")
# Position ids, or tables that the engine made from them; tokens are along the last but one dim.
IDS = ("img_ids", "txt_ids")


def split_sequence(model: nn.Module, axis: Axis) -> None:
    """Make a diffusers transformer with joint attention split its tokens over `axis`.

    Raise ValueError if the model has no attention processors.
    """
    if axis.size == 1:
        return
    ulysses = Ulysses(axis, attention_of(model))
    replace_attention(model, ulysses.attend)
    model.register_forward_pre_hook(ulysses.enter, with_kwargs=True)
    model.register_forward_hook(ulysses.leave)


def attention_of(model: nn.Module) -> Attention:
    """Return the attention function that the blocks of a diffusers transformer call."""
    processor = attention_modules(model)[0].processor
    attention: Attention = type(processor).__call__.__globals__["dispatch_attention_fn"]
    return attention


def replace_attention(model: nn.Module, attend: Attention) -> None:
    """Make all blocks of a diffusers transformer call `attend` for their attention.

    The attention processors remain diffusers' own code; only the `dispatch_attention_fn` that they
    call is replaced. So this works for any family and copies nothing.
    """
    for module in attention_modules(model):
        module.processor = with_attention(module.processor, attend)


def attention_modules(model: nn.Module) -> list[Any]:
    """Return the modules with attention processors; raise ValueError if there are none."""
    modules = [each for each in model.modules() if getattr(each, "processor", None) is not None]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no attention processors")
    return modules


def with_attention(processor: Any, attend: Attention) -> Any:
    """Return a processor that differs from `processor` only in the attention function it calls.

    The `__call__` of its class is rebuilt with other globals, because patching the module would
    change every model of the process, those without sequence parallel too.
    """
    kind = type(processor)
    stock: Any = kind.__call__
    names = stock.__globals__ | {"dispatch_attention_fn": attend}
    call = types.FunctionType(
        stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__
    )
    call.__kwdefaults__ = stock.__kwdefaults__
    return type(kind.__name__, (kind,), {"__call__": call})()
