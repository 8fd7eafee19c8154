"""The ranks of one group: where each stands on the tensor and the sequence axis, and how they meet.

Rank = sequence rank * tensor size + tensor rank: ranks that exchange most are neighbours, and so on
one node where the leader orders ranks by node.
"""

import socket
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from flux_ray.config.tier import Parallel, keep_gloo_local

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True)
class Axis:
    """One rank's place on an axis; an axis of size 1 has no process group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """One rank's place in its group. The default is a model that is not split."""

    world: Axis = field(default_factory=Axis)
    tensor: Axis = field(default_factory=Axis)
    sequence: Axis = field(default_factory=Axis)


@dataclass(frozen=True)
class Endpoint:
    """Where rank 0 waits for the others."""

    host: str
    port: int


def open_store(host: str, timeout_s: float) -> TCPStore:
    """Rank 0's meeting point, at that address of this node and at no other: it asks for no secret.

    The system picks the port and the store holds it from then on. A port that was found free and
    given up again may be another's before it is used.
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
        # Left to itself it listens at all addresses.
        master_listen_fd=listener.detach(),
    )


def connect_store(endpoint: Endpoint, timeout_s: float) -> TCPStore:
    """The other ranks' way to the store of rank 0."""
    return TCPStore(
        endpoint.host, endpoint.port, is_master=False, timeout=timedelta(seconds=timeout_s)
    )


def join_mesh(
    store: Store | None, rank: int, parallel: Parallel, device: str, timeout_s: float
) -> Mesh:
    """Meet the other ranks, at the store where there are any; returns when all are there.

    `timeout_s` also bounds every collective on the CPU.
    """
    num_ranks = parallel.num_ranks
    if num_ranks == 1:
        return Mesh()
    if parallel.num_nodes == 1:
        keep_gloo_local()
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
    """The ranks that share the tokens of `sequence_rank` and split its weights."""
    first = sequence_rank * parallel.tensor
    return list(range(first, first + parallel.tensor))


def sequence_ranks(parallel: Parallel, tensor_rank: int) -> list[int]:
    """The ranks that hold the weights of `tensor_rank` and split its tokens."""
    return list(range(tensor_rank, parallel.num_ranks, parallel.tensor))


def axis_of(rank: int, groups: list[list[int]]) -> Axis:
    """The axis along which `rank` stands in one of `groups`. All ranks make all groups."""
    if len(groups) == 1:
        return Axis(rank, len(groups[0]), dist.group.WORLD)
    if len(groups[0]) == 1:
        return Axis()
    made = [(ranks, dist.new_group(ranks)) for ranks in groups]
    ranks, group = next((ranks, group) for ranks, group in made if rank in ranks)
    return Axis(ranks.index(rank), len(ranks), group)


class LockstepBroken(RuntimeError):
    """The ranks of one group were about to work on different things."""


def assert_same(world: Axis, value: int) -> None:
    """Raise LockstepBroken if not every rank has come here with the same value.

    One small sum on the CPU: rank 0 weighs as much as all others together, so that it is zero only
    if all agree (but for values that happen to cancel out).
    """
    if world.size == 1:
        return
    weight = world.size - 1 if world.rank == 0 else -1
    total = torch.tensor([weight * value, value * value * weight], dtype=torch.int64)
    dist.all_reduce(total, group=world.group)
    if total.any():
        raise LockstepBroken(f"rank {world.rank} of {world.size} came with {value}, others did not")
