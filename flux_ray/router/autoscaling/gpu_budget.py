"""Share the GPUs of a cluster between tiers that together want more: minimum, priority, proportion.

`share_gpus` divides them once. `GpuBudget` does so again each time a tier's policy asks, and waits
until GPUs that another tier still holds are free. `Budgeted` is a tier's policy within that budget.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from flux_ray.router.autoscaling.scaler import Scaling, ScalingState, target_of

logger = logging.getLogger("ray.serve")

# A tier that has not asked for so long is gone, and its share is free. Serve asks ten times a
# second, but not while it imports the code of a tier that is deployed again. On a busy machine that
# took 24 s, and with a shorter limit the replicas that were up lost their GPUs to another tier.
FORGET_S = 60.0
# A longer pause between two calls means that Serve called no policy. It counts as this long only,
# so that no tier is taken for gone because of it.
MAX_STEP_S = 1.0


@dataclass(frozen=True)
class Want:
    """The replicas that a tier wants, with so many GPUs each; higher priorities come first."""

    tier: str
    replicas: int
    num_gpus_per_replica: int = 1
    min_replicas: int = 0
    priority: int = 0


def share_gpus(wants: Iterable[Want], budget: int) -> dict[str, int]:
    """Return how many replicas each tier gets; never more GPUs than `budget` in all.

    First all tiers get their minimum, the highest priority first. Then they get what they want
    beyond that, by priority; tiers of equal priority get about the same share of what they want.
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
    """Give one replica at a time to the tier with the least share of what it wants.

    `granted` is updated. Return how many GPUs are left.
    """
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
    """Return `replicas`, or fewer if the GPUs suffice for fewer; on processors all of them."""
    size = want.num_gpus_per_replica
    return min(replicas, budget // size) if size else replicas


def check_budget(wants: Iterable[Want], budget: int) -> None:
    """Raise ValueError if one replica of a tier, or the minimum of all, exceeds the budget."""
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


@dataclass(frozen=True)
class BudgetTerms:
    """A tier's terms in the budget: the GPUs of all tiers, those of one replica, its priority."""

    gpu_budget: int
    num_gpus_per_replica: int = 1
    priority: int = 0


@dataclass(frozen=True)
class Member:
    """A tier as the budget knows it: what it wants, what it holds, and when it last asked."""

    want: Want
    held_gpus: int
    gpu_budget: int
    heard_at: float


class GpuBudget:
    """The GPUs of one cluster, and what its tiers want of them at the moment.

    One per process of Serve's controller; the policies of all tiers call it from there. GPUs that
    another tier still holds are not given away before it has let go of them. A new budget knows of
    none that are held. That is safe, because a policy wants no more than it has until the ledger
    has answered, and by then all policies have asked.
    """

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._budgets: frozenset[int] = frozenset()
        self._asked_at: float | None = None
        # Stands still while no tier asks.
        self._clock_s = 0.0

    def grant(self, want: Want, gpu_budget: int, state: ScalingState) -> int:
        """Note what the tier wants, and return how many replicas it may have now, in all."""
        size, target = want.num_gpus_per_replica, target_of(state)
        self._pass_time(state.now)
        self._note(want, target * size, gpu_budget)
        num_gpus = self._smallest()
        share = share_gpus([member.want for member in self._members.values()], num_gpus)[want.tier]
        free = max(0, num_gpus - sum(member.held_gpus for member in self._members.values()))
        granted = min(share, target + fitting(want, share, free))
        self._note(want, max(target, granted) * size, gpu_budget)
        return granted

    def _pass_time(self, now: float) -> None:
        if self._asked_at is not None:
            self._clock_s += min(max(0.0, now - self._asked_at), MAX_STEP_S)
        self._asked_at = now
        for tier, member in list(self._members.items()):
            if self._clock_s - member.heard_at > FORGET_S:
                del self._members[tier]

    def _note(self, want: Want, held_gpus: int, gpu_budget: int) -> None:
        self._members[want.tier] = Member(want, held_gpus, gpu_budget, self._clock_s)

    def _smallest(self) -> int:
        """Return the smallest budget that any tier names: an old config may be half deployed."""
        budgets = frozenset(member.gpu_budget for member in self._members.values())
        if budgets != self._budgets and len(budgets) > 1:
            said = ", ".join(f"{tier} {m.gpu_budget}" for tier, m in sorted(self._members.items()))
            logger.warning("gpu_budget differs between tiers, the smallest counts: %s", said)
        self._budgets = budgets
        return min(budgets)


class Budgeted:
    """A tier's scaling policy, limited to what the cluster's budget has for the tier."""

    def __init__(self, policy: Scaling, budget: GpuBudget, tier: str, terms: BudgetTerms) -> None:
        self._policy = policy
        self._budget = budget
        self._tier = tier
        self._terms = terms

    def replicas(self, state: ScalingState) -> int:
        """Return what the policy wants, or as much of it as the budget has for this tier."""
        terms = self._terms
        want = Want(
            self._tier,
            self._policy.replicas(state),
            terms.num_gpus_per_replica,
            state.min_replicas,
            terms.priority,
        )
        return self._budget.grant(want, terms.gpu_budget, state)


_CLUSTER = GpuBudget()


def cluster_budget() -> GpuBudget:
    """Return the one budget of this process; Serve's controller runs the policies of all tiers.

    Call this rather than import `_CLUSTER`: Serve pickles the module of a policy by value, so every
    tier would get a budget of its own.
    """
    return _CLUSTER
