"""A model from its checkpoint: built without weights, each rank reading only its own slices."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.linear import split_rows
from flux_ray.parallel.mesh import Axis
from flux_ray.parallel.shards import Shard, Shards, shards_for

# What to add to a parameter's local part before it gets its dtype; None for most.
Delta = Callable[[str, Shard | None, Axis], Tensor | None]


@dataclass(frozen=True)
class Recipe:
    """How a component's weights become a rank's module.

    `prefix` is what the checkpoint writes before the module's own parameter names. With
    `whole=True` a tensor of the checkpoint that the model has no place for is an error.
    """

    checkpoint: Checkpoint
    axis: Axis
    dtype: torch.dtype
    device: str = "cpu"
    prefix: str = ""
    whole: bool = True
    deltas: tuple[Delta, ...] = field(default=())


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with its parameters on the meta device; buffers that it computes are real."""
    with init_empty_weights():
        return build()


def load_sharded(
    build: Callable[[], nn.Module], plan: Mapping[str, Any], recipe: Recipe
) -> nn.Module:
    """The module that `build` makes, with this rank's part of every parameter, in eval mode.

    An uneven split is refused before any weight is read.
    """
    model = build_empty(build)
    shards = shards_for(model, plan, recipe.axis.size)
    shapes = {name: tensor.shape for name, tensor in saved_tensors(model)}
    if recipe.whole:
        refuse_unknown(set(shapes), recipe)
    with recipe.checkpoint.opened():
        for name, shape in shapes.items():
            place(model, name, read_local(name, shape, shards.get(name), recipe))
    settle_linears(model, shards, recipe.axis)
    return model.to(recipe.device).eval()


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that a checkpoint has, tied ones once."""
    yield from model.named_parameters()
    persistent = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def refuse_unknown(names: set[str], recipe: Recipe) -> None:
    """A tensor that nobody asks for is a part of the model that would be left out in silence."""
    unknown = sorted(recipe.checkpoint.files.keys() - {recipe.prefix + name for name in names})
    if unknown:
        raise ValueError(
            f"{recipe.checkpoint.folder} has {len(unknown)} tensors that the model does not know,"
            f" the first is {unknown[0]}"
        )


def read_local(name: str, shape: torch.Size, shard: Shard | None, recipe: Recipe) -> Tensor:
    """This rank's part of a tensor, deltas added, in the recipe's dtype, on its device."""
    local = recipe.checkpoint.read(recipe.prefix + name, shape, shard, recipe.axis)
    for delta in recipe.deltas:
        added = delta(name, shard, recipe.axis)
        if added is not None:
            local = local.float() + added
    if local.is_floating_point():
        local = local.to(recipe.dtype)
    return local.to(recipe.device)


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where the module has the parameter or buffer of that name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def settle_linears(model: nn.Module, shards: Shards, axis: Axis) -> None:
    """Tell the split linears their sizes, and the row-parallel ones to sum."""
    for name, shard in shards.items():
        owner, _, leaf = name.rpartition(".")
        linear = model.get_submodule(owner)
        if leaf != "weight" or not isinstance(linear, nn.Linear):
            continue
        linear.out_features, linear.in_features = linear.weight.shape
        if shard.dim == 1:
            split_rows(linear, axis)
