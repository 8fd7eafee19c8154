"""Run the fleet of a Serve config file in simulated time.

`tier_model` reads a tier's args, `run_fleet` sends a trace through the tiers' pools, and
`simulate` does so for any pools. `EventLoop` makes everything happen in order of time: arrivals,
assignments, completions, cold starts and failures.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flux_ray.catalog import PROCESSOR
from flux_ray.config import TierArgs
from flux_ray.router.autoscaling.gpu_budget import (
    Budgeted,
    BudgetTerms,
    GpuBudget,
    Want,
    check_budget,
    share_gpus,
)
from flux_ray.router.autoscaling.scaler import Scaler, Scaling, ScalingRules
from flux_ray.router.pricing import ReplicaSpec, price, work_at
from flux_ray.router.queue import TierQueue
from flux_ray.router.trace import BadTrace, TracedRequest
from flux_ray.simulator.outcome import Arrival, Outcome, ReplicaOutage, ReplicaPool, check_pools
from flux_ray.simulator.tier import SimulatedTier
from flux_ray.simulator.traffic import sample_of

# After the last arrival, if nothing but scaling rounds has happened for so long, the requests that
# still wait will never be served, and the simulation ends.
PATIENCE_S = 3600.0


class EventLoop:
    """A loop that runs events in order of time; at equal times, the one scheduled first."""

    def __init__(self, pools: Sequence[ReplicaPool]) -> None:
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self.tiers = {
            name: SimulatedTier(pool, self.schedule) for name, pool in check_pools(pools).items()
        }
        self.now = 0.0

    def schedule(self, at_s: float, event: Callable[[float], None]) -> None:
        """Call the event at `at_s`, with that time."""
        heapq.heappush(self._events, (at_s, next(self._numbers), event))

    def run(self, arrivals: Iterator[Arrival], period_s: float) -> None:
        """Run until the last request is done, with a scaling round every `period_s`."""
        is_scaled = any(tier.pool.scaling is not None for tier in self.tiers.values())
        next_round = 0.0 if is_scaled else math.inf
        busy_at = 0.0
        arrival = next(arrivals, None)
        while True:
            event_at = self._events[0][0] if self._events else math.inf
            arrival_at = arrival.at_s if arrival is not None else math.inf
            if arrival is None and not any(tier.requests for tier in self.tiers.values()):
                break
            at = min(event_at, arrival_at, next_round)
            if at == math.inf or (arrival is None and at > busy_at + PATIENCE_S):
                break
            self.now = max(self.now, at)
            if event_at <= at:
                busy_at = at
                heapq.heappop(self._events)[2](at)
            elif arrival is not None and arrival_at <= at:
                busy_at = at
                self.tiers[arrival.tier].arrive(arrival, at)
                arrival = next(arrivals, None)
            else:
                next_round += period_s
                self._scale(at)

    def finish(self) -> Outcome:
        """Count up to now, give up what still waits, and return the outcome."""
        for tier in self.tiers.values():
            tier.pass_time(self.now)
            tier.give_up()
        return Outcome({name: tier.outcome() for name, tier in self.tiers.items()}, self.now)

    def _scale(self, now: float) -> None:
        for tier in self.tiers.values():
            tier.scale(now)


def simulate(
    arrivals: Iterable[Arrival],
    pools: Sequence[ReplicaPool],
    *,
    scaling_period_s: float = 1.0,
    failures: Sequence[ReplicaOutage] = (),
    horizon_s: float | None = None,
) -> Outcome:
    """Send arrivals through the pools, and return what became of them.

    Arrivals must be in order of time, from 0 on. Those after `horizon_s` are left out, and GPU
    hours and curves are counted until then; without it, until the last request is done. Equal
    arguments give equal outcomes. Raise KeyError for an arrival of a tier that has no pool.
    """
    engine = EventLoop(pools)
    for failure in failures:
        engine.schedule(failure.at_s, partial(engine.tiers[failure.tier].fail, failure.replica))
    taken = iter(arrivals)
    if horizon_s is not None:
        limit_s = horizon_s
        taken = itertools.takewhile(lambda arrival: arrival.at_s <= limit_s, taken)
        for tier in engine.tiers.values():
            tier.horizon_s = limit_s
    engine.run(taken, scaling_period_s)
    return engine.finish()


NUM_SAMPLES = 2000
# If the file does not say how long a request may wait, that is what its deadline leaves beside its
# own work, but at least this share of its price: a target of 0 would be impossible.
LEAST_WAIT_SHARE = 0.1


@dataclass(frozen=True)
class FleetPlan:
    """The settings of a simulation that hold for all tiers.

    `slo_scale`: a request without a deadline gets this many times its price. `failures_per_hour`:
    replicas of each tier that die. `gpu_budget`: GPUs that scaling tiers share; None takes the
    config file's, if it has one.
    """

    slo_scale: float = 3.0
    failures_per_hour: float = 0.0
    seed: int = 0
    gpu_budget: int | None = None


@dataclass(frozen=True)
class TierModel:
    """One simulated tier: its layout, its first number of replicas, and how it scales.

    `num_full_replicas` is the most that the config file allows; `--load` is a share of what these
    can do.
    """

    tier: str
    layout: ReplicaSpec
    num_replicas: int
    num_full_replicas: int
    min_replicas: int
    max_replicas: int
    rules: ScalingRules
    mean_cost_s: float
    gpu_budget: int | None = None
    priority: int = 0

    @property
    def num_gpus_per_replica(self) -> int:
        """The number of GPUs of a replica; 0 on processors."""
        return 0 if self.layout.card == PROCESSOR else self.layout.num_ranks

    @property
    def is_scaled(self) -> bool:
        """Whether the tier can scale, or shares GPUs with others."""
        return self.min_replicas < self.max_replicas or self.gpu_budget is not None


@dataclass(frozen=True)
class Overrides:
    """Settings that replace those of the config file; None keeps the file's."""

    min_replicas: int | None = None
    max_replicas: int | None = None
    cold_start_s: float | None = None


def tier_model(
    args: TierArgs, card: str, slo_scale: float, overrides: Overrides = Overrides()
) -> TierModel:
    """Return the model of a tier's args on GPUs of that name; ValueError if it is impossible.

    If the file says nothing about scaling, a request may wait for what `slo_scale` leaves it.
    """
    layout = ReplicaSpec.of(args, card)
    mean_s = mean_cost_s(args.tier, layout)
    scaling = args.autoscaling
    least = most = begin = args.num_replicas
    rules = ScalingRules(max(slo_scale - 1, LEAST_WAIT_SHARE) * mean_s, args.cold_start_s)
    if scaling is not None:
        # It begins with the least, as it does in Serve.
        begin = least = scaling.min_replicas
        most = scaling.max_replicas
        rules = ScalingRules(
            scaling.target_wait_s, scaling.cold_start_s, scaling.headroom, idle_s=scaling.idle_s
        )
    full = most
    least = least if overrides.min_replicas is None else overrides.min_replicas
    most = most if overrides.max_replicas is None else overrides.max_replicas
    if least > most:
        raise ValueError(f"{args.tier}: min_replicas {least} is above max_replicas {most}")
    if overrides.cold_start_s is not None:
        rules = replace(rules, cold_start_s=overrides.cold_start_s)
    begin = min(max(begin, least), most)
    model = TierModel(args.tier, layout, begin, full, least, most, rules, mean_s)
    if scaling is None:
        return model
    budget = scaling.gpu_budget if model.num_gpus_per_replica else None
    return replace(model, gpu_budget=budget, priority=scaling.priority)


def mean_cost_s(tier: str, layout: ReplicaSpec) -> float:
    """Return the mean replica seconds of the tier's generated mix of requests."""
    entries = sample_of(tier, NUM_SAMPLES)
    return sum(cost_s(entry, layout) for entry in entries) / len(entries)


def cost_s(entry: TracedRequest, layout: ReplicaSpec) -> float:
    """Return the replica seconds of a request, with references as large as the model uses."""
    work = work_at(
        entry.tier, entry.width, entry.height, entry.steps, entry.references, entry.images
    )
    return price(replace(work, num_forwards=entry.forwards), layout).total_s


def priced(
    entries: Iterable[TracedRequest], models: Mapping[str, TierModel], slo_scale: float
) -> Iterator[Arrival]:
    """Give each request of a trace its price, and a deadline of `slo_scale` prices if it has none.

    Raise BadTrace for a tier that the fleet does not have.
    """
    for entry in entries:
        if entry.tier not in models:
            raise BadTrace(f"the trace asks for {entry.tier}, which the config does not serve")
        seconds = cost_s(entry, models[entry.tier].layout)
        deadline_s = slo_scale * seconds if entry.deadline_s is None else entry.deadline_s
        yield Arrival(entry.at_s, entry.tier, seconds, deadline_s, entry.key)


def failures_of(
    tiers: Iterable[str], per_hour: float, duration_s: float, seed: int
) -> list[ReplicaOutage]:
    """Return random failures of replicas at that rate for each tier, in order of time."""
    failures = []
    for tier in tiers:
        rng = random.Random(f"{seed} failures of {tier}")
        at_s = rng.expovariate(per_hour / 3600) if per_hour > 0 else duration_s
        while at_s < duration_s:
            failures.append(ReplicaOutage(at_s, tier, rng.randrange(1_000_000)))
            at_s += rng.expovariate(per_hour / 3600)
    return sorted(failures, key=lambda failure: failure.at_s)


def run_fleet(
    models: Mapping[str, TierModel],
    entries: Iterable[TracedRequest],
    plan: FleetPlan,
    duration_s: float,
    *,
    until_done: bool = False,
) -> Outcome:
    """Send a trace through the fleet, with the cluster's own queue and scaler.

    GPU hours are counted until `duration_s`, or until the last request is done if `until_done`.
    BadTrace and ValueError say what of trace or plan is impossible.
    """
    return simulate(
        priced(entries, models, plan.slo_scale),
        pools_of(models, plan),
        failures=failures_of(models, plan.failures_per_hour, duration_s, plan.seed),
        horizon_s=None if until_done else duration_s,
    )


def pools_of(models: Mapping[str, TierModel], plan: FleetPlan) -> list[ReplicaPool]:
    """Return new pools for one simulation, whose first replicas fit into the budget."""
    num_gpus = budget_of(models, plan)
    begin = {model.tier: model.num_replicas for model in models.values()}
    if num_gpus is not None:
        wants = [
            Want(
                model.tier,
                model.num_replicas,
                model.num_gpus_per_replica,
                model.min_replicas,
                model.priority,
            )
            for model in models.values()
            if model.is_scaled
        ]
        check_budget(wants, num_gpus)
        begin |= share_gpus(wants, num_gpus)
    budget = GpuBudget()
    return [
        ReplicaPool(
            tier=model.tier,
            queue=TierQueue(cold_start_s=model.rules.cold_start_s),
            num_replicas=begin[model.tier],
            num_gpus_per_replica=model.num_gpus_per_replica,
            cold_start_s=model.rules.cold_start_s,
            scaling=scaling_of(model, budget, num_gpus),
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
        )
        for model in models.values()
    ]


def budget_of(models: Mapping[str, TierModel], plan: FleetPlan) -> int | None:
    """Return the GPU budget of the plan, or else the smallest that a tier names; or None."""
    if plan.gpu_budget is not None:
        return plan.gpu_budget
    budgets = (model.gpu_budget for model in models.values())
    return min((budget for budget in budgets if budget is not None), default=None)


def scaling_of(model: TierModel, budget: GpuBudget, num_gpus: int | None) -> Scaling | None:
    """Return the tier's scaling policy, None if it does not scale."""
    if not model.is_scaled:
        return None
    scaler = Scaler(model.rules)
    if num_gpus is None:
        return scaler
    terms = BudgetTerms(num_gpus, model.num_gpus_per_replica, model.priority)
    return Budgeted(scaler, budget, model.tier, terms)
