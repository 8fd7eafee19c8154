"""Where ranks stand on the two axes, and that they notice when they are out of step."""

import pytest
import torch
import torch.distributed as dist

from flux_ray.config.tier import Parallel
from flux_ray.parallel.mesh import LockstepBroken, Mesh, assert_same, sequence_ranks, tensor_ranks
from tests.ranks import Ranks


def test_neighbours_share_the_weights() -> None:
    parallel = Parallel(tensor=2, sequence=3)
    assert parallel.num_ranks == 6
    assert [tensor_ranks(parallel, row) for row in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [sequence_ranks(parallel, column) for column in range(2)] == [[0, 2, 4], [1, 3, 5]]


def places(mesh: Mesh) -> tuple[int, ...]:
    """Ranks on the axes, and what each axis sums to when every rank gives its own number."""
    sums = []
    for axis in (mesh.tensor, mesh.sequence):
        total = torch.tensor([mesh.world.rank])
        if axis.size > 1:
            dist.all_reduce(total, group=axis.group)
        sums.append(int(total))
    return mesh.world.rank, mesh.tensor.rank, mesh.sequence.rank, *sums


@pytest.mark.parametrize(
    ("tensor", "sequence", "expected"),
    [
        (1, 1, [(0, 0, 0, 0, 0)]),
        (2, 1, [(0, 0, 0, 1, 0), (1, 1, 0, 1, 1)]),
        (1, 2, [(0, 0, 0, 0, 1), (1, 0, 1, 1, 1)]),
        (2, 2, [(0, 0, 0, 1, 2), (1, 1, 0, 1, 4), (2, 0, 1, 5, 2), (3, 1, 1, 5, 4)]),
    ],
)
def test_each_axis_reaches_its_own_ranks(
    run_ranks: Ranks, tensor: int, sequence: int, expected: list[tuple[int, ...]]
) -> None:
    assert run_ranks(Parallel(tensor=tensor, sequence=sequence), places) == expected


def notices(mesh: Mesh, values: list[int]) -> bool:
    """Whether this rank learns that they differ."""
    try:
        assert_same(mesh.world, values[mesh.world.rank])
    except LockstepBroken:
        return True
    return False


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_notice_that_one_of_them_works_on_something_else(
    run_ranks: Ranks, num_ranks: int
) -> None:
    group = Parallel(tensor=num_ranks)
    assert run_ranks(group, notices, [7] * num_ranks) == [False] * num_ranks
    for odd in range(num_ranks):
        values = [7] * num_ranks
        values[odd] = 8
        assert run_ranks(group, notices, values) == [True] * num_ranks


def test_ranks_notice_values_whose_sum_is_the_same(run_ranks: Ranks) -> None:
    assert run_ranks(Parallel(tensor=3), notices, [7, 6, 8]) == [True] * 3
