"""Weights in fewer bits: which of them, how each is stored, and the proof that it is.

Only the linear layers of the blocks are quantized, as BFL publishes it: embedders, modulation and
what leads out of the model stay in the model's dtype.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flux_ray.config.tier import Quantization
from flux_ray.parallel.mesh import Axis

BLOCK = re.compile(r"(^|\.)(\w*transformer_blocks|layers|block)\.\d+\.")
# FLUX.1 has its modulation inside the blocks (`norm1.linear`), T5 its table of positions.
KEPT = ("norm", "relative_attention_bias")
STORAGE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8}
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
# As torchao divides: the middle of its 256 steps is half a step off zero.
INT8_STEPS = 127.5
NF4_BLOCK = 64


class PrecisionNotApplied(ValueError):
    """A weight is not held in the precision that the operator asked for."""


@dataclass(frozen=True)
class StorageFormat:
    """How a rank holds one tensor: the dtype of its data, and the bytes with its scales."""

    dtype: torch.dtype
    num_bytes: int


def is_quantized(name: str) -> bool:
    """Whether the parameter of that name is a block's linear weight."""
    return (
        name.endswith(".weight")
        and BLOCK.search(name) is not None
        and not any(kept in name for kept in KEPT)
    )


def stored_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, quantization: Quantization | None = None
) -> int:
    """The bytes of a tensor of that (local) shape, with its scales."""
    num_elements = math.prod(shape)
    if quantization is None:
        return num_elements * dtype.itemsize
    if quantization == "nf4":
        # Two elements a byte, an fp32 scale a block, an fp32 table of the 16 values.
        return -(-num_elements // 2) + 4 * -(-num_elements // NF4_BLOCK) + 4 * 16
    # An fp32 scale a row; torchao's int8 has a zero point a row too.
    return num_elements + shape[0] * (4 if quantization == "fp8" else 5)


def stored_as(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, quantization: Quantization | None
) -> StorageFormat:
    """How a parameter of that name and local shape has to be held."""
    if quantization is None or not is_quantized(name):
        return StorageFormat(dtype, stored_bytes(shape, dtype))
    return StorageFormat(STORAGE[quantization], stored_bytes(shape, dtype, quantization))


def check_quantization(quantization: Quantization | None, axis: Axis) -> None:
    """Refuse what cannot be done, before any weight is read."""
    if quantization != "nf4":
        return
    if axis.size > 1:
        raise ValueError(
            "quantization nf4 is for one small card: its blocks of 64 weights cannot be cut,"
            f" but parallel.tensor is {axis.size}"
        )
    four_bit_layers()


def quantize(
    weight: Tensor, quantization: Quantization, dtype: torch.dtype, row_axis: Axis
) -> Tensor:
    """A weight [out, in] of any floating dtype in fewer bits; `dtype` is what it computes in.

    Where the ranks of `row_axis` share the rows, they agree on each row's scale: what a rank stores
    is then the slice, bit for bit, of what one rank alone would store.
    """
    if quantization == "nf4":
        layers = four_bit_layers()
        four_bit = layers.Params4bit(weight.to(dtype), quant_type="nf4", compress_statistics=False)
        packed: Tensor = four_bit.to(weight.device)
        return packed
    amax = agreed_amax(weight, row_axis)
    return to_fp8(weight, amax, dtype) if quantization == "fp8" else to_int8(weight, amax, dtype)


def agreed_amax(weight: Tensor, row_axis: Axis) -> Tensor:
    """The largest magnitude of each whole row: [out, 1], fp32."""
    amax = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True)).float()
    if row_axis.size > 1:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=row_axis.group)
    return amax


def to_fp8(weight: Tensor, amax: Tensor, dtype: torch.dtype) -> Tensor:
    """torchao's tensor. Its own way of making one takes no scales, and makes NaN of a zero row."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    scale = (amax / FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    data = (weight / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    activations = None
    if quantizes_activations(cuda_capability(weight.device), dtype, weight.shape):
        # Without a lower bound an activation row of zeros becomes NaN.
        activations = QuantizeTensorToFloat8Kwargs(
            hp_value_lb=1e-12, kernel_preference=KernelPreference.TORCH
        )
    held: Tensor = Float8Tensor(
        data,
        scale,
        block_size=[1, weight.shape[1]],
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=activations,
        kernel_preference=KernelPreference.TORCH,
        dtype=dtype,
    )
    return held


def to_int8(weight: Tensor, amax: Tensor, dtype: torch.dtype) -> Tensor:
    """torchao's tensor, weight-only."""
    from torchao.quantization import Int8Tensor, PerRow

    scale = (amax / INT8_STEPS).clamp_(min=torch.finfo(torch.float32).eps)
    made = Int8Tensor.from_hp(weight.float(), PerRow(), scale=scale)
    held: Tensor = Int8Tensor(
        made.qdata, made.scale, made.block_size, dtype, zero_point=made.zero_point
    )
    return held


def quantizes_activations(
    capability: tuple[int, int] | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> bool:
    """Whether the activations too become FP8, row by row as they come, or the weights alone.

    The first needs FP8 units (CUDA capability 8.9), and torch's row-wise product takes bf16 and
    multiples of 16. Tests run it by its slow CPU kernel; on a GPU it has not been run.
    """
    return (
        capability is not None
        and capability >= (8, 9)
        and dtype == torch.bfloat16
        and all(size % 16 == 0 for size in shape)
    )


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """None where there is no CUDA."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def four_bit_layers() -> Any:
    """bitsandbytes' layers, an optional extra."""
    try:
        from bitsandbytes import nn as layers
    except ImportError as error:
        raise ValueError(
            "quantization nf4 needs bitsandbytes: pip install 'flux-ray[nf4]'"
        ) from error
    return layers


def settle_four_bit(model: nn.Module, dtype: torch.dtype) -> None:
    """Make linears that hold 4-bit weights compute with them."""
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not hasattr(linear.weight, "quant_state"):
            continue
        four_bit = four_bit_layers().Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta"
        )
        four_bit.weight, four_bit.bias = linear.weight, linear.bias
        model.set_submodule(name, four_bit)


def held_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a parameter is made of, its data first."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    state = getattr(tensor, "quant_state", None)
    return [tensor] if state is None else [tensor, state.absmax, state.code]


def check_precision(tensors: Mapping[str, Tensor], expected: Mapping[str, StorageFormat]) -> int:
    """The bytes that are held; PrecisionNotApplied if a tensor is not held as expected."""
    total_bytes = 0
    for name, want in expected.items():
        parts = held_parts(tensors[name])
        held = StorageFormat(parts[0].dtype, sum(part.nbytes for part in parts))
        if held != want:
            raise PrecisionNotApplied(
                f"{name} is held as {held.dtype} in {held.num_bytes} bytes,"
                f" not as {want.dtype} in {want.num_bytes}"
            )
        total_bytes += held.num_bytes
    return total_bytes
