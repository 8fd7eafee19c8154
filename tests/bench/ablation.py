"""Measure what each part of the queue is worth, by switching one part off at a time.

The measure is attainment: the share of requests that meet their deadlines. The cells are those of
routing.py, with right and with wrong estimates, and one in which one of two keys floods the tier.
The last line is one JSON object. `--quick` shows the shape of the results in a minute.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

from flux_ray.router.queue import admission, tier_queue
from flux_ray.router.queue.admission import EstimateError, Line, QueueEntry
from flux_ray.router.queue.shares import Shares
from flux_ray.router.queue.slots import Slots
from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.simulator.fleet import simulate
from flux_ray.simulator.outcome import ReplicaPool
from tests.bench.routing_cells import KLEIN, LOADS, OURS, SCALES, WORKS, Cell, Work, arrivals_of
from tests.bench.routing_cells import attained as attained_in
from tests.simulator.test_fairness import attainment, stream

NOISES = (0.0, 0.3)
# In percentage points: a part that moves attainment by less in every cell is not worth its code.
WORTH = 0.5
# A fleet so large that more than MAX_SIMULATED requests wait.
CROWD_REPLICAS, CROWD_REQUESTS = 1000, 20_000


def turn_away_newcomer(
    new: QueueEntry, ahead: tuple[Line, ...], line: Line, slots: Slots, now: float
) -> list[QueueEntry]:
    """Reject a new request that does not fit, where the queue might evict longer ones for it."""
    return [new] if admission.choose_evictions(new, ahead, line, slots, now) else []


@contextmanager
def without_evictions() -> Iterator[None]:
    """Switch off the eviction of waiting requests."""
    with mock.patch.object(tier_queue, "choose_evictions", turn_away_newcomer):
        yield


@contextmanager
def without_estimate_error() -> Iterator[None]:
    """Switch off the allowance for errors of estimates."""
    with mock.patch.object(EstimateError, "least_share", 1.0):
        yield


@contextmanager
def without_fluid() -> Iterator[None]:
    """Switch off the approximation for long queues: every start is simulated exactly."""
    with (
        mock.patch.object(admission, "MAX_SIMULATED", sys.maxsize),
        mock.patch.object(tier_queue, "MAX_SIMULATED", sys.maxsize),
    ):
        yield


@contextmanager
def without_shares() -> Iterator[None]:
    """Switch off the fair shares of keys."""
    with mock.patch.object(Shares, "is_due", lambda self, now: False):
        yield


@contextmanager
def whole() -> Iterator[None]:
    """Switch nothing off, for comparison."""
    yield


PARTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "whole": whole,
    "evictions": without_evictions,
    "estimate error": without_estimate_error,
    "fluid": without_fluid,
    "shares": without_shares,
}
Figures = dict[str, dict[str, float]]


def cell_figures(num: int, seeds: range) -> dict[str, float]:
    """Return the share of requests in time of each cell, tier and error of the estimates."""
    figures = {}
    for work in WORKS:
        for scale in SCALES:
            for load in LOADS:
                for noise in NOISES:
                    cell = Cell(scale, load)
                    streams = [arrivals_of(work, cell, num, seed, noise) for seed in seeds]
                    result = attained_in(work, streams, OURS)
                    name = f"{work.tier} slack {scale:g} load {load:.0%} noise {noise:.0%}"
                    figures[name] = result.by_requests
    return figures


def flooded_figures() -> dict[str, float]:
    """Return the share of a modest key's GPU seconds in time, while another key floods the tier."""
    modest, flood = (stream("modest", 0.1, 1, 300.0), stream("greedy", 10.0, 2, 300.0))
    return {"a modest key beside a flood": attainment("modest", modest, flood)}


def crowd_figures() -> tuple[dict[str, float], float]:
    """Return the attainment in a crowd, and the milliseconds of a request in the queue."""
    work = Work(KLEIN.tier, CROWD_REPLICAS, KLEIN.costs_s)
    crowd = arrivals_of(work, Cell(2.0, 1.2), CROWD_REQUESTS, 0)
    begin = time.perf_counter()
    outcome = simulate(crowd, [ReplicaPool(work.tier, TierQueue(), work.num_replicas)])
    taken_ms = (time.perf_counter() - begin) * 1e3 / CROWD_REQUESTS
    return {f"{CROWD_REPLICAS} cards at 120 %": outcome.tiers[work.tier].attainment}, taken_ms


def print_table(figures: Figures, costs_ms: dict[str, float]) -> None:
    """Print the points of attainment that are lost without each part, and where most are."""
    print("without             worst    mean  cells over half a point  ms/request  worst in")
    for part, cells in figures.items():
        lost = {name: 100 * (figures["whole"][name] - value) for name, value in cells.items()}
        worst = max(lost, key=lambda name: lost[name])
        num = sum(abs(each) >= WORTH for each in lost.values())
        mean = sum(lost.values()) / len(lost)
        row = f"{part:16} {lost[worst]:8.2f} {mean:7.2f} {num:12} of {len(lost)}"
        print(f"{row} {costs_ms[part]:16.3f}  {worst}")


def main() -> None:
    """Measure the whole, then without each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000, help="per tier, cell and seed")
    parser.add_argument("--seeds", type=int, default=2, help="streams that are averaged")
    parser.add_argument("--quick", action="store_true", help="500 requests, one seed")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.seeds = 500, 1
    figures: Figures = {}
    costs_ms: dict[str, float] = {}
    for part, switched_off in PARTS.items():
        with switched_off():
            crowd, costs_ms[part] = crowd_figures()
            cells = cell_figures(options.requests, range(options.seeds))
            figures[part] = cells | crowd | flooded_figures()
    print_table(figures, costs_ms)
    print(json.dumps({"attainment": figures, "ms_per_request": costs_ms}))


if __name__ == "__main__":
    main()
