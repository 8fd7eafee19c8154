"""One cluster's GPUs, shared among the tiers by priority when they do not suffice for all."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

from flux_ray.router.scaling_state import Scaling, ScalingState, target_of


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


class GpuBudget:
    """The budget of one cluster, and what its tiers want of it at the moment.

    GPUs that another tier still holds are not given away before it has let go of them.
    """

    def __init__(self, num_gpus: int) -> None:
        self.num_gpus = num_gpus
        self._wants: dict[str, Want] = {}
        self._held_gpus: dict[str, int] = {}

    def grant(self, want: Want, state: ScalingState) -> int:
        """How many replicas the tier may have now, in all."""
        size = want.num_gpus_per_replica
        self._wants[want.tier] = want
        self._held_gpus[want.tier] = target_of(state) * size
        share = share_gpus(self._wants.values(), self.num_gpus)[want.tier]
        free = max(0, self.num_gpus - sum(self._held_gpus.values()))
        granted = min(share, target_of(state) + fitting(want, share, free))
        self._held_gpus[want.tier] = max(target_of(state), granted) * size
        return granted


class Budgeted:
    """A tier's policy within the cluster's budget."""

    def __init__(
        self,
        policy: Scaling,
        budget: GpuBudget,
        tier: str,
        num_gpus_per_replica: int = 1,
        priority: int = 0,
    ) -> None:
        self._policy = policy
        self._budget = budget
        self._want = Want(tier, 0, num_gpus_per_replica, priority=priority)

    def replicas(self, state: ScalingState) -> int:
        """What the policy wants, or as much of it as the budget has for this tier."""
        wanted = self._policy.replicas(state)
        want = replace(self._want, replicas=wanted, min_replicas=state.min_replicas)
        return self._budget.grant(want, state)
