"""A key that floods the tier against keys within their share, through the whole simulation."""

import heapq
import random
from collections.abc import Iterator

import pytest

from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.simulator.fleet import simulate
from flux_ray.simulator.outcome import Arrival, ReplicaPool

NUM_REPLICAS = 8


def stream(
    key: str, load: float, seed: int, until_s: float, weight: float = 1.0
) -> Iterator[Arrival]:
    """Requests of half a second to two seconds, that may take three times as long."""
    dice = random.Random(seed)
    now = 0.0
    while (now := now + dice.expovariate(load * NUM_REPLICAS)) < until_s:
        cost_s = dice.choice((0.5, 0.5, 1.0, 2.0))
        yield Arrival(now, "tiny", cost_s, 3 * cost_s, key, weight)


def attainment(key: str, *streams: Iterator[Arrival]) -> float:
    """Of the GPU seconds of that key, met; measured from outside."""
    met = {"met": 0.0, "all": 0.0}

    class Watched(TierQueue):
        def finish(self, ticket_id: str, now: float) -> None:
            ticket = running.pop(ticket_id)
            if ticket.key == key and now <= ticket.deadline + 1e-6:
                met["met"] += ticket.cost_s
            super().finish(ticket_id, now)

        def take(self, now: float):  # type: ignore[no-untyped-def]
            grants, refused = super().take(now)
            running.update({grant.request.ticket_id: grant.request for grant in grants})
            return grants, refused

    running: dict = {}  # type: ignore[type-arg]
    arrivals = list(heapq.merge(*streams, key=lambda arrival: arrival.at_s))
    met["all"] = sum(arrival.cost_s for arrival in arrivals if arrival.key == key)
    simulate(arrivals, [ReplicaPool("tiny", Watched(share_window_s=10.0), NUM_REPLICAS)])
    return met["met"] / met["all"]


def test_who_floods_does_not_starve_others() -> None:
    alone = attainment("modest", stream("modest", 0.1, 1, 300.0))
    beside = attainment("modest", stream("modest", 0.1, 1, 300.0), stream("greedy", 10.0, 2, 300.0))
    assert alone > 0.99
    assert beside > alone - 0.03


def test_what_the_modest_leave_goes_to_the_greedy() -> None:
    greedy = attainment("greedy", stream("modest", 0.1, 1, 200.0), stream("greedy", 10.0, 2, 200.0))
    assert greedy == pytest.approx(0.9 / 10.0, abs=0.015)


def test_two_greedy_ones_share_evenly() -> None:
    def streams() -> tuple[Iterator[Arrival], Iterator[Arrival]]:
        return stream("a", 3.0, 1, 200.0), stream("b", 3.0, 2, 200.0)

    first, second = (attainment(key, *streams()) for key in "ab")
    assert first == pytest.approx(second, rel=0.15)
