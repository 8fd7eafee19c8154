"""Load a model from its checkpoint, each rank reading only its own slices.

The model is built on the meta device, and then its parameters are filled one by one: sliced, LoRAs
added, quantized, put on the device. The one layer that tensor parallelism needs is here too, a
linear whose inputs are split over the ranks. Linears whose outputs are split need no code: they
are the same layer with fewer rows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from flux_ray.config import Quantization
from flux_ray.parallel.checkpoint import Checkpoint, Shard, Shards, shards_for
from flux_ray.parallel.mesh import Axis
from flux_ray.parallel.precision import (
    StorageFormat,
    check_precision,
    check_quantization,
    is_quantized,
    quantize,
    settle_four_bit,
    stored_as,
)


class Delta(Protocol):
    """Something added to parameters before they are cast or quantized, such as a LoRA."""

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise ValueError if it does not fit a model with parameters of these whole shapes."""

    def __call__(self, name: str, shard: Shard | None, axis: Axis) -> Tensor | None:
        """Return what to add to this rank's part of the parameter `name`, or None for nothing.

        The tensor has the shape of that part and is fp32 on the model's device.
        """


@dataclass(frozen=True)
class LoadSpec:
    """How to make a rank's module from a component's weights.

    `axis`: the ranks that the parameters are split over. `dtype`: of everything that is not
    quantized; `quantization` concerns only the linear weights of the blocks. `prefix`: what the
    checkpoint puts before the module's own parameter names. `whole`: it is an error if the
    checkpoint has a tensor that the model does not know.
    """

    checkpoint: Checkpoint
    axis: Axis
    dtype: torch.dtype
    device: str = "cpu"
    prefix: str = ""
    whole: bool = True
    deltas: tuple[Delta, ...] = ()
    quantization: Quantization | None = None


def load_sharded(
    build: Callable[[], nn.Module], plan: Mapping[str, Any], recipe: LoadSpec
) -> nn.Module:
    """Return the module that `build` makes with this rank's part of every parameter, in eval mode.

    Raise ValueError before any weight is read if a parameter cannot be split evenly, or if a delta
    or a tensor of the checkpoint has no place in the model. Raise PrecisionNotApplied at the end if
    a weight is not stored as `recipe` says. All ranks of `recipe.axis` must call it together.
    """
    model = build_empty(build)
    shards = shards_for(model, plan, recipe.axis.size)
    shapes = {name: tensor.shape for name, tensor in saved_tensors(model)}
    expected = plan_storage(model, shards, recipe.axis, recipe.dtype, recipe.quantization)
    check_quantization(recipe.quantization, recipe.axis)
    if recipe.whole:
        refuse_unknown(set(shapes), recipe)
    for delta in recipe.deltas:
        delta.check(shapes)
    with recipe.checkpoint.opened():
        # One after the other: a rank never holds two unquantized weights, which might not fit, and
        # all ranks exchange the scales in the same order.
        for name, shape in shapes.items():
            own = replace(recipe, dtype=dtype_of(model, name, recipe.dtype))
            place(model, name, read_local(name, shape, shards.get(name), own))
    finish_linears(model, shards, recipe.axis)
    settle_four_bit(model, recipe.dtype)
    model.to(recipe.device).eval()
    check_precision(dict(saved_tensors(model)), expected)
    return model


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module with its parameters on the meta device.

    Buffers that the module computes itself, such as rotary frequencies, are real: no checkpoint has
    them.
    """
    with init_empty_weights():
        return build()


def plan_storage(
    model: nn.Module,
    shards: Shards,
    axis: Axis,
    dtype: torch.dtype,
    quantization: Quantization | None,
) -> dict[str, StorageFormat]:
    """Return how a rank has to store each of the model's tensors, by name.

    The model may be on the meta device: the planner counts bytes this way, and the loader checks
    them, so that a plan cannot differ from what is loaded.
    """
    planned = {}
    for name, tensor in saved_tensors(model):
        shard = shards.get(name)
        shape = tensor.shape if shard is None else shard.local_shape(tensor.shape, axis)
        own_dtype = dtype_of(model, name, dtype) if tensor.is_floating_point() else tensor.dtype
        planned[name] = stored_as(name, shape, own_dtype, quantization)
    return planned


def dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter: the model's, unless diffusers keeps this one in fp32.

    FLUX.3 normalises queries and keys in fp32, with weights that have to be fp32 too.
    """
    kept = model._keep_in_fp32_modules if isinstance(model, ModelMixin) else None
    return torch.float32 if kept and not set(kept).isdisjoint(name.split(".")) else dtype


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and the persistent buffers, by name; tied ones only once."""
    yield from model.named_parameters()
    persistent = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def refuse_unknown(names: set[str], recipe: LoadSpec) -> None:
    """Raise ValueError if the checkpoint has tensors besides those named.

    Such a tensor belongs to a part of the model that would be left out without any error.
    """
    unknown = sorted(recipe.checkpoint.files.keys() - {recipe.prefix + name for name in names})
    if unknown:
        raise ValueError(
            f"{recipe.checkpoint.folder} has {len(unknown)} tensors that the model does not know,"
            f" the first is {unknown[0]}"
        )


def read_local(name: str, shape: torch.Size, shard: Shard | None, recipe: LoadSpec) -> Tensor:
    """Return this rank's part of a tensor on its device, with deltas added, cast or quantized.

    Deltas are added in fp32 before that: in a few bits, most of a small LoRA would be rounded away.
    """
    local = recipe.checkpoint.read(recipe.prefix + name, shape, shard, recipe.axis)
    for delta in recipe.deltas:
        added = delta(name, shard, recipe.axis)
        if added is not None:
            local = local.to(recipe.device, torch.float32) + added
    if recipe.quantization is not None and is_quantized(name):
        shares_rows = shard is not None and shard.dim == 1
        # If dim 1 is split, each row is spread over the ranks, which must agree on its scale.
        row_axis = recipe.axis if shares_rows else Axis()
        return quantize(local.to(recipe.device), recipe.quantization, recipe.dtype, row_axis)
    dtype = recipe.dtype if local.is_floating_point() else local.dtype
    # Make no copy that is not needed. diffusers works on the memory-mapped file; a copy would begin
    # at another alignment, which changes the last bit of products on the CPU.
    return local.to(recipe.device, dtype)


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor into the module as its parameter or buffer of that name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        # bitsandbytes' 4-bit weights are parameters of a class of their own, with their scales.
        module.register_parameter(leaf, tensor)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def finish_linears(model: nn.Module, shards: Shards, axis: Axis) -> None:
    """Set the local sizes of all split linears, and make row-parallel ones sum over the ranks."""
    for name, shard in shards.items():
        owner, _, leaf = name.rpartition(".")
        linear = model.get_submodule(owner)
        if leaf != "weight" or not isinstance(linear, nn.Linear):
            continue
        linear.out_features, linear.in_features = linear.weight.shape
        if shard.dim == 1:
            split_rows(linear, axis)


def split_rows(linear: nn.Linear, axis: Axis) -> None:
    """Turn a linear that holds this rank's columns of the weight into a RowParallelLinear.

    Its class is changed in place, so that hooks and references to the module stay valid.
    """
    assert type(linear) is nn.Linear, f"{type(linear).__name__} cannot be row-parallel"
    linear.__class__ = RowParallelLinear
    linear.axis = axis  # type: ignore[assignment]


class RowParallelLinear(nn.Linear):
    """A linear layer whose input features are split over the ranks of `axis`.

    It computes y = sum over ranks of x_local @ W_local^T, plus the bias, with one all-reduce.
    `weight` is [out, in / ranks]; x is [..., in / ranks], which is what column-parallel layers
    before it return. Every rank has the whole bias, which is added once, after the sum.
    """

    axis: Axis

    def forward(self, input: Tensor) -> Tensor:
        """Return y, [..., out] in the dtype of the input, the same on every rank."""
        partial = nn.functional.linear(input, self.weight)
        dist.all_reduce(partial, group=self.axis.group)
        return partial if self.bias is None else partial + self.bias
