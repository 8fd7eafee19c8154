"""The event loop: arrivals, hand-overs, completions, cold starts and failures in order of time."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from flux_ray.simulator.outcome import Outcome
from flux_ray.simulator.tier import SimulatedTier
from flux_ray.simulator.values import Arrival, ReplicaOutage, ReplicaPool, check_pools

# With no arrival left and nothing but scaling rounds happening, nobody will serve what waits.
PATIENCE_S = 3600.0


class EventLoop:
    """Things happen in order of time; of two at the same time, the one first scheduled."""

    def __init__(self, pools: Sequence[ReplicaPool]) -> None:
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self.tiers = {
            name: SimulatedTier(pool, self.schedule) for name, pool in check_pools(pools).items()
        }
        self.now = 0.0

    def schedule(self, at_s: float, event: Callable[[float], None]) -> None:
        """Call the event, with the time, then."""
        heapq.heappush(self._events, (at_s, next(self._numbers), event))

    def run(self, arrivals: Iterator[Arrival], period_s: float) -> None:
        """Until the last request is done."""
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
        """Close the books."""
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
    """Send the arrivals, which are in order of time from 0 on, through the pools.

    Runs until the last request is done. Arrivals after `horizon_s` are not taken, and GPU hours
    and curves are counted until then; without it, until the last arrival's work is done. Equal
    arguments give equal outcomes. KeyError for an arrival of a tier that has no pool.
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
