"""The one layer that tensor parallelism needs: a linear whose input columns are split."""

import torch.distributed as dist
from torch import Tensor, nn

from flux_ray.parallel.mesh import Axis


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
