"""What a queue says of a request before it comes is what happens to it."""

import random

import pytest

from flux_ray.router.queue.admission import Forecast
from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.router.queue.tier_queue import TierQueue


def ticket(name: str, cost_s: float, deadline: float = 1000.0) -> QueuedRequest:
    return QueuedRequest(name, "tiny", cost_s, deadline)


def queue_of(*replicas: str) -> TierQueue:
    queue = TierQueue()
    queue.set_replicas(replicas, 0.0)
    return queue


def test_a_free_replica_is_there_at_once():
    assert queue_of("a").forecast(ticket("x", 1.0), 0.0) == Forecast(0.0)


def test_with_no_replica_it_waits_for_one_to_start():
    queue = TierQueue(cold_start_s=20.0)
    assert queue.forecast(ticket("x", 1.0), 0.0) == Forecast(20.0)
    assert queue.forecast(ticket("x", 1.0, 20.0), 0.0) == Forecast(20.0, is_refused=True)
    assert queue.forecast(ticket("x", 1.0), 15.0) == Forecast(20.0), "nobody has asked for it"
    queue.submit(ticket("first", 2.0), 15.0)
    assert queue.forecast(ticket("x", 1.0), 25.0) == Forecast(pytest.approx(12.0))


def test_what_is_before_it_is_waited_for_and_nothing_else():
    queue = queue_of("a")
    for name, cost_s, deadline in (("running", 3, 100), ("soon", 2, 20), ("late", 50, 900)):
        queue.submit(ticket(name, cost_s, deadline), 0.0)
    queue.take(0.0)
    assert queue.forecast(ticket("x", 1.0, 100.0), 1.0) == Forecast(pytest.approx(4.0))


def test_a_refusal_is_foretold():
    queue = queue_of("a")
    queue.submit(ticket("running", 3, 100), 0.0)
    queue.take(0.0)
    assert queue.forecast(ticket("x", 1.0, 3.0), 0.0).is_refused
    assert queue.forecast(ticket("x", 1.0, 0.5), 0.0).is_refused, "shorter than the work"


def test_a_forecast_changes_nothing_and_comes_true():
    """A hundred random lines: taken or not as foretold, and begun when foretold."""
    rng = random.Random(5)
    for _ in range(100):
        queue, now = queue_of("a", "b"), 0.0
        for number in range(rng.randrange(12)):
            queue.submit(ticket(f"{number}", rng.choice((1, 3, 9)), rng.uniform(10, 60)), now)
            queue.take(now)
        new = ticket("new", rng.choice((1, 3, 9)), rng.uniform(5, 60))
        waiting_s = queue.waiting_s(now)
        told = queue.forecast(new, now)
        assert queue.forecast(new, now) == told
        assert queue.waiting_s(now) == waiting_s
        is_refused = queue.submit(new, now) is not None
        assert told.is_refused == is_refused
        if is_refused:
            continue
        # Others may have given way, which only makes it earlier.
        assert begin_of(queue, "new") <= told.wait_s + 1e-6


def begin_of(queue: TierQueue, ticket_id: str) -> float:
    """Run the queue to the ticket's turn."""
    now, ends = 0.0, {}
    while True:
        for grant in queue.take(now)[0]:
            if grant.request.ticket_id == ticket_id:
                return now
        running = queue._slots._by_ticket
        ends = {name: slot.free_at for name, slot in running.items()}
        name = min(ends, key=ends.__getitem__)
        now = ends[name]
        queue.finish(name, now)
