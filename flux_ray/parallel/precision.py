"""Quantize weights to FP8, INT8 or NF4, and check afterwards that they are stored that way.

Only the linear layers of the blocks are quantized, as in BFL's own quantized checkpoints:
embedders, modulation and output layers stay in the model's dtype.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flux_ray.config import Quantization
from flux_ray.parallel.mesh import Axis

# FLUX.3 has blocks for each kind of token (`mode_blocks.image.0`), besides the joint ones.
BLOCK = re.compile(r"(^|\.)(\w*transformer_blocks|\w*mode_blocks(\.\w+)?|layers|block)\.\d+\.")
# Not quantized though inside the blocks: FLUX.1's modulation (`norm1.linear`), T5's position bias.
KEPT = ("norm", "relative_attention_bias")
STORAGE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8}
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
# torchao divides by this, half of 255, and not by 127: its 256 steps lie half a step off zero.
INT8_STEPS = 127.5
NF4_BLOCK = 64


class PrecisionNotApplied(ValueError):
    """A loaded weight is not stored in the precision that the operator asked for."""


@dataclass(frozen=True)
class StorageFormat:
    """How a rank stores one tensor: the dtype of its data, and its bytes including the scales."""

    dtype: torch.dtype
    num_bytes: int


def is_quantized(name: str) -> bool:
    """Return whether a parameter is the weight of a block's linear layer, judged by its name."""
    return (
        name.endswith(".weight")
        and BLOCK.search(name) is not None
        and not any(kept in name for kept in KEPT)
    )


def stored_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, quantization: Quantization | None = None
) -> int:
    """Return the bytes of a rank's tensor of this local shape, including its scales."""
    num_elements = math.prod(shape)
    if quantization is None:
        return num_elements * dtype.itemsize
    if quantization == "nf4":
        # Two elements per byte, an fp32 scale per block, an fp32 table of the 16 values.
        return -(-num_elements // 2) + 4 * -(-num_elements // NF4_BLOCK) + 4 * 16
    # An fp32 scale per row; torchao's int8 has a zero point of one byte per row too.
    return num_elements + shape[0] * (4 if quantization == "fp8" else 5)


def stored_as(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, quantization: Quantization | None
) -> StorageFormat:
    """Return how a parameter of this name and local shape has to be stored."""
    if quantization is None or not is_quantized(name):
        return StorageFormat(dtype, stored_bytes(shape, dtype))
    return StorageFormat(STORAGE[quantization], stored_bytes(shape, dtype, quantization))


def check_quantization(quantization: Quantization | None, axis: Axis) -> None:
    """Raise ValueError if weights cannot be quantized on these ranks; call it before reading any.

    Only nf4 has conditions: a single rank, and bitsandbytes must be installed.
    """
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
    """Quantize a weight [out, in] of any floating dtype; products with it are computed in `dtype`.

    If rows are spread over the ranks of `row_axis`, these agree on each row's scale, so that a rank
    stores exactly its slice of what a single rank would store. They must call it together.
    """
    if quantization == "nf4":
        layers = four_bit_layers()
        four_bit = layers.Params4bit(weight.to(dtype), quant_type="nf4", compress_statistics=False)
        packed: Tensor = four_bit.to(weight.device)
        return packed
    amax = agreed_amax(weight, row_axis)
    return to_fp8(weight, amax, dtype) if quantization == "fp8" else to_int8(weight, amax, dtype)


def agreed_amax(weight: Tensor, row_axis: Axis) -> Tensor:
    """Return the largest magnitude of each row, over all ranks that share it: fp32 [out, 1]."""
    # Without abs(), which would allocate the whole weight a second time.
    amax = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True)).float()
    if row_axis.size > 1:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=row_axis.group)
    return amax


def to_fp8(weight: Tensor, amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight [out, in] as torchao's FP8 tensor, with one scale per row from `amax`.

    It is built here because torchao's own constructor takes no scales, which the ranks have agreed
    on, and turns a row of zeros into NaN.
    """
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    scale = (amax / FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    data = (weight / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    activations = None
    if quantizes_activations(cuda_capability(weight.device), dtype, weight.shape):
        # Without a lower bound, a row of zeros in the activations becomes NaN.
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
    """Return a weight [out, in] as torchao's INT8 tensor, with one scale per row from `amax`.

    Only the weight is INT8; it is unpacked to `dtype` for each product.
    """
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
    """Return whether activations are quantized to FP8 too, row by row, and not only the weights.

    That needs FP8 units (CUDA capability 8.9 or higher), and torch's row-wise product needs bf16
    and sizes that are multiples of 16. `shape` is the weight's, [out, in]. Tests run it with
    torch's slow CPU kernel; it has not been run on a GPU.
    """
    return (
        capability is not None
        and capability >= (8, 9)
        and dtype == torch.bfloat16
        and all(size % 16 == 0 for size in shape)
    )


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the GPU's CUDA capability, or None if the device is not a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def four_bit_layers() -> Any:
    """Return bitsandbytes' module of layers; raise ValueError if this extra is not installed."""
    try:
        from bitsandbytes import nn as layers
    except ImportError as error:
        raise ValueError(
            "quantization nf4 needs bitsandbytes: pip install 'flux-ray[nf4]'"
        ) from error
    return layers


def settle_four_bit(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace linears that hold 4-bit weights by bitsandbytes' layer, which can multiply them.

    `dtype` is what they compute in. The shapes of 4-bit weights are packed ones, so torch's linear
    cannot use them.
    """
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not hasattr(linear.weight, "quant_state"):
            continue
        # On the meta device: its own weight is replaced at once and should take no memory.
        four_bit = four_bit_layers().Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta"
        )
        four_bit.weight, four_bit.bias = linear.weight, linear.bias
        model.set_submodule(name, four_bit)


def held_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a parameter consists of: its data, then its scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    state = getattr(tensor, "quant_state", None)
    return [tensor] if state is None else [tensor, state.absmax, state.code]


def check_precision(tensors: Mapping[str, Tensor], expected: Mapping[str, StorageFormat]) -> int:
    """Return the bytes of all tensors; raise PrecisionNotApplied if one is not as expected.

    A library that quietly falls back to the old dtype would otherwise be noticed only when a GPU's
    memory runs out.
    """
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
