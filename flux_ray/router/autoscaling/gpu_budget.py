"""How GPUs that do not suffice for all tiers are shared: minimum, priority, proportion."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Want:
    """What a tier would like: replicas of so many GPUs each. Higher priorities come first."""

    tier: str
    replicas: int
    num_gpus_per_replica: int = 1
    min_replicas: int = 0
    priority: int = 0


def share_gpus(wants: Iterable[Want], budget: int) -> dict[str, int]:
    """Replicas by tier: whole ones only, and never more GPUs than `budget` in all.

    First everybody's minimum, the highest priority first; then what each wants beyond that, by
    priority; among equals each gets about the same share of what it wants.
    """
    ordered = sorted(wants, key=lambda want: -want.priority)
    granted = {}
    for want in ordered:
        granted[want.tier] = fitting(want, want.min_replicas, budget)
        budget -= granted[want.tier] * want.num_gpus_per_replica
    for _, equals in groupby(ordered, key=lambda want: want.priority):
        budget = share_among_equals(list(equals), granted, budget)
    return granted


def share_among_equals(wants: list[Want], granted: dict[str, int], budget: int) -> int:
    """Grant one replica at a time to whoever has the least of what it wants; what GPUs are left."""
    while True:
        short = [
            want
            for want in wants
            if granted[want.tier] < want.replicas and want.num_gpus_per_replica <= budget
        ]
        if not short:
            return budget
        least = min(short, key=lambda want: granted[want.tier] / want.replicas)
        granted[least.tier] += 1
        budget -= least.num_gpus_per_replica


def fitting(want: Want, replicas: int, budget: int) -> int:
    """So many replicas, or as many as there are GPUs for; one on processors needs none."""
    size = want.num_gpus_per_replica
    return min(replicas, budget // size) if size else replicas


def check_budget(wants: Iterable[Want], budget: int) -> None:
    """ValueError if one replica of a tier, or the minimum of all, is more than there is."""
    wants = list(wants)
    for want in wants:
        size = want.num_gpus_per_replica
        if size > budget:
            raise ValueError(
                f"gpu_budget {budget} is below one replica of {want.tier}, which takes {size} GPUs"
            )
    least = sum(want.min_replicas * want.num_gpus_per_replica for want in wants)
    if least > budget:
        raise ValueError(f"gpu_budget {budget} is below the min_replicas of all: {least} GPUs")
