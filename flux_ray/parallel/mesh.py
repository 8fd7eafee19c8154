"""The ranks of one replica: how they find each other, and their places on the two axes.

Rank = sequence rank * tensor size + tensor rank. Tensor ranks exchange the most, so they are
neighbours; as the leader orders ranks by node, neighbours are on one node.
"""

import socket
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from flux_ray.config import Parallel, keep_collectives_local

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True)
class Axis:
    """One rank's place on an axis; an axis of size 1 has no process group and never communicates.

    An axis without a group also stands for `size` ranks in plans, where no process runs.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """One rank's place in its replica. The default is a model that is not split.

    `world`: all ranks. `tensor`: those that split the weights. `sequence`: those that split the
    tokens.
    """

    world: Axis = field(default_factory=Axis)
    tensor: Axis = field(default_factory=Axis)
    sequence: Axis = field(default_factory=Axis)


@dataclass(frozen=True)
class Endpoint:
    """The address of rank 0's store, where the other ranks connect."""

    host: str
    port: int


def open_store(host: str, timeout_s: float) -> TCPStore:
    """Open rank 0's store, through which the ranks find each other, on a free port of `host`.

    It listens on that address of this node only, because the store has no authentication. The
    socket is bound here and handed to the store: if a port were merely found free and closed again,
    another process could take it before the store opens it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        # Without this the store would listen on all addresses.
        master_listen_fd=listener.detach(),
    )


def connect_store(endpoint: Endpoint, timeout_s: float) -> TCPStore:
    """Connect another rank to the store of rank 0; raise if it is not reachable in time."""
    return TCPStore(
        endpoint.host, endpoint.port, is_master=False, timeout=timedelta(seconds=timeout_s)
    )


def join_mesh(
    store: Store | None, rank: int, parallel: Parallel, device: str, timeout_s: float
) -> Mesh:
    """Join the other ranks through the store, and return this rank's mesh once all are there.

    A single rank needs no store. `timeout_s` also limits every later collective on the CPU, so it
    must outlast the slowest rank's loading.
    """
    num_ranks = parallel.num_ranks
    if num_ranks == 1:
        return Mesh()
    if parallel.num_nodes == 1:
        # Otherwise Gloo and NCCL listen where others on the network can reach them.
        keep_collectives_local()
    dist.init_process_group(
        BACKENDS[device],
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    world = Axis(rank, num_ranks, dist.group.WORLD)
    columns = [tensor_ranks(parallel, row) for row in range(parallel.sequence)]
    rows = [sequence_ranks(parallel, column) for column in range(parallel.tensor)]
    return Mesh(world, axis_of(rank, columns), axis_of(rank, rows))


def tensor_ranks(parallel: Parallel, sequence_rank: int) -> list[int]:
    """Return the ranks that work on the same tokens, and split the weights among them."""
    first = sequence_rank * parallel.tensor
    return list(range(first, first + parallel.tensor))


def sequence_ranks(parallel: Parallel, tensor_rank: int) -> list[int]:
    """Return the ranks that hold the same part of the weights, and split the tokens."""
    return list(range(tensor_rank, parallel.num_ranks, parallel.tensor))


def axis_of(rank: int, groups: list[list[int]]) -> Axis:
    """Return the axis on which `rank` is in one of these groups of ranks.

    Every rank creates every process group, its own or not: torch requires that.
    """
    if len(groups) == 1:
        return Axis(rank, len(groups[0]), dist.group.WORLD)
    if len(groups[0]) == 1:
        return Axis()
    made = [(ranks, dist.new_group(ranks)) for ranks in groups]
    ranks, group = next((ranks, group) for ranks, group in made if rank in ranks)
    return Axis(ranks.index(rank), len(ranks), group)


class LockstepBroken(RuntimeError):
    """The ranks of one replica were about to work on different jobs, which would mix tensors."""


def assert_same(world: Axis, value: int) -> None:
    """Raise LockstepBroken unless all ranks call it with the same value.

    It costs one small all-reduce on the CPU, of the values and of their squares, which must fit
    int64. Rank 0 weighs as much as all other ranks together, and they weigh -1 each. Both sums are
    zero only if the others' values have rank 0's as their mean and no variance: if all are equal.
    """
    if world.size == 1:
        return
    weight = world.size - 1 if world.rank == 0 else -1
    total = torch.tensor([weight * value, value * value * weight], dtype=torch.int64)
    dist.all_reduce(total, group=world.group)
    if total.any():
        raise LockstepBroken(f"rank {world.rank} of {world.size} came with {value}, others did not")
