"""A model from its checkpoint: built without weights, each rank reading only its own slices.

The one layer that tensor parallelism needs: a linear whose input columns are split.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn

from flux_ray.config.tier import Quantization
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


class RowParallelLinear(nn.Linear):
    """y = sum over ranks of x_local @ W_local^T, + bias: one all-reduce, nothing gathered.

    `weight` is [out, in / ranks]; x is [..., in / ranks], as the column-parallel layers before it
    leave it. The bias is whole and added once, after the sum.
    """

    axis: Axis

    def forward(self, input: Tensor) -> Tensor:
        """[..., out], the same on every rank."""
        partial = nn.functional.linear(input, self.weight)
        dist.all_reduce(partial, group=self.axis.group)
        return partial if self.bias is None else partial + self.bias


def split_rows(linear: nn.Linear, axis: Axis) -> None:
    """Make a linear that holds its rank's columns sum over the ranks."""
    assert type(linear) is nn.Linear, f"{type(linear).__name__} cannot be row-parallel"
    linear.__class__ = RowParallelLinear
    linear.axis = axis  # type: ignore[assignment]


class Delta(Protocol):
    """What is added to parameters before they get their dtype or are quantized."""

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """ValueError for what the model of those (whole) parameters has no place for."""

    def __call__(self, name: str, shard: Shard | None, axis: Axis) -> Tensor | None:
        """For this rank's part of a parameter, on the model's device; None for most."""


@dataclass(frozen=True)
class LoadSpec:
    """How a component's weights become a rank's module.

    `prefix` is what the checkpoint writes before the module's own parameter names. With
    `whole=True` a tensor of the checkpoint that the model has no place for is an error.
    `quantization` is of the blocks' linear weights; all else gets `dtype`.
    """

    checkpoint: Checkpoint
    axis: Axis
    dtype: torch.dtype
    device: str = "cpu"
    prefix: str = ""
    whole: bool = True
    deltas: tuple[Delta, ...] = ()
    quantization: Quantization | None = None


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with its parameters on the meta device; buffers that it computes are real."""
    with init_empty_weights():
        return build()


def load_sharded(
    build: Callable[[], nn.Module], plan: Mapping[str, Any], recipe: LoadSpec
) -> nn.Module:
    """The module that `build` makes, with this rank's part of every parameter, in eval mode.

    What cannot be done is refused before any weight is read: an uneven split, a delta or a tensor
    without a place. PrecisionNotApplied if the weights are not held as the recipe says.
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
        # One after the other: a rank never holds two weights that are still to be quantized, and
        # all ranks agree on scales in the same order.
        for name, shape in shapes.items():
            place(model, name, read_local(name, shape, shards.get(name), recipe))
    finish_linears(model, shards, recipe.axis)
    settle_four_bit(model, recipe.dtype)
    model.to(recipe.device).eval()
    check_precision(dict(saved_tensors(model)), expected)
    return model


def plan_storage(
    model: nn.Module,
    shards: Shards,
    axis: Axis,
    dtype: torch.dtype,
    quantization: Quantization | None,
) -> dict[str, StorageFormat]:
    """How a rank has to hold each of the model's tensors, by name; the model may be empty."""
    planned = {}
    for name, tensor in saved_tensors(model):
        shard = shards.get(name)
        shape = tensor.shape if shard is None else shard.local_shape(tensor.shape, axis)
        own_dtype = dtype if tensor.is_floating_point() else tensor.dtype
        planned[name] = stored_as(name, shape, own_dtype, quantization)
    return planned


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that a checkpoint has, tied ones once."""
    yield from model.named_parameters()
    persistent = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def refuse_unknown(names: set[str], recipe: LoadSpec) -> None:
    """A tensor that nobody asks for is a part of the model that would be left out in silence."""
    unknown = sorted(recipe.checkpoint.files.keys() - {recipe.prefix + name for name in names})
    if unknown:
        raise ValueError(
            f"{recipe.checkpoint.folder} has {len(unknown)} tensors that the model does not know,"
            f" the first is {unknown[0]}"
        )


def read_local(name: str, shape: torch.Size, shard: Shard | None, recipe: LoadSpec) -> Tensor:
    """This rank's part of a tensor on its device: deltas added in fp32, then made smaller."""
    local = recipe.checkpoint.read(recipe.prefix + name, shape, shard, recipe.axis)
    for delta in recipe.deltas:
        added = delta(name, shard, recipe.axis)
        if added is not None:
            local = local.to(recipe.device, torch.float32) + added
    if recipe.quantization is not None and is_quantized(name):
        shares_rows = shard is not None and shard.dim == 1
        row_axis = recipe.axis if shares_rows else Axis()
        return quantize(local.to(recipe.device), recipe.quantization, recipe.dtype, row_axis)
    dtype = recipe.dtype if local.is_floating_point() else local.dtype
    # No copy where none is needed: a window on the file, as diffusers has it, begins at another
    # address than a copy would, and that changes the last bit of products on the CPU.
    return local.to(recipe.device, dtype)


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where the module has the parameter or buffer of that name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def finish_linears(model: nn.Module, shards: Shards, axis: Axis) -> None:
    """Tell the split linears their sizes, and the row-parallel ones to sum."""
    for name, shard in shards.items():
        owner, _, leaf = name.rpartition(".")
        linear = model.get_submodule(owner)
        if leaf != "weight" or not isinstance(linear, nn.Linear):
            continue
        linear.out_features, linear.in_features = linear.weight.shape
        if shard.dim == 1:
            split_rows(linear, axis)
