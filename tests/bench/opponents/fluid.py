"""What no scheduler can surpass, preemptive or not, though it knew everything: a proven bound."""

import math
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from flux_ray.simulator.outcome import Arrival
from tests.bench.opponents.preemptive import Attained

# Costs within this factor are taken together, at the weight of the smallest of them.
SAME_COST = 1.02


def preemptive_bound(arrivals: Sequence[Arrival], num_replicas: int) -> Attained:
    """A linear relaxation, solved exactly: the replicas are one, `num_replicas` times as fast.

    It preempts at no cost, and a request may be served in part and then counts in part. What can be
    served of a set of requests is the rank of a polymatroid; earliest deadline first attains it
    (Glover 1967), and taking those of the highest value per second first attains the best sum
    (Edmonds 1970). Both relaxations only add to what replicas can do, so nobody attains more.
    Requests whose deadline is shorter than their work are not served at all.
    """
    possible = [arrival for arrival in arrivals if arrival.deadline_s >= arrival.cost_s - 1e-9]
    sizes = sorted({_size(arrival.cost_s) for arrival in possible})
    by_requests = before_s = 0.0
    for size in sizes:
        served_s = _rank((a for a in possible if _size(a.cost_s) <= size), num_replicas)
        by_requests += (served_s - before_s) / SAME_COST**size
        before_s = served_s
    total_s = sum(arrival.cost_s for arrival in arrivals)
    by_requests = min(by_requests / len(arrivals), len(possible) / len(arrivals))
    return Attained(by_requests, before_s / total_s)


def _size(cost_s: float) -> int:
    return math.floor(math.log(cost_s, SAME_COST))


def _rank(arrivals: Iterable[Arrival], speed: int) -> float:
    """The most seconds of them that can be worked off by their deadlines."""
    waiting: list[tuple[float, float]] = []
    served_s = now = 0.0
    for arrival in arrivals:
        served_s += _work(waiting, now, arrival.at_s, speed)
        now = arrival.at_s
        heappush(waiting, (now + arrival.deadline_s, arrival.cost_s))
    return served_s + _work(waiting, now, math.inf, speed)


def _work(waiting: list[tuple[float, float]], now: float, until: float, speed: int) -> float:
    served_s = 0.0
    while waiting and now < until:
        deadline, left_s = heappop(waiting)
        end = min(deadline, until)
        can_s = max(end - now, 0.0) * speed
        if left_s <= can_s:
            served_s += left_s
            now += left_s / speed
            continue
        served_s += can_s
        now = max(now, end)
        if deadline > until:
            heappush(waiting, (deadline, left_s - can_s))
    return served_s
