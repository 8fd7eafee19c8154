"""Simulate our queue against the routers that users have: deadlines met, by load and slack.

The fleet has 8 replicas of dev and 16 of klein. Every policy gets the same arrivals, and a refused
request counts as a missed deadline. Every opponent also runs with the queue bound that is best for
it in each cell. The last line is one JSON object. `--quick` shows the shape of the results in a
minute.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from flux_ray.router.queue.tier_queue import TierQueue
from flux_ray.simulator.fleet import simulate
from flux_ray.simulator.outcome import ReplicaPool
from tests.bench.opponents.preemptive import Attained
from tests.bench.opponents.routers import EarlyBinding, least_work
from tests.bench.routing_cells import (
    KLEIN,
    LOADS,
    OURS,
    SCALES,
    WAITS,
    WORKS,
    Cell,
    Work,
    arrivals_of,
    attained,
    best,
    cell_results,
    mean,
)

Results = dict[Cell, dict[str, dict[str, Attained]]]
SHOWN = ("round_robin", "power_of_two", "least_requests", "least_work", "fifo")
NOISES = (0.0, 0.1, 0.3)
MEASURES: dict[str, Callable[[Attained], float]] = {
    "slo": lambda result: result.by_requests,
    "slo_by_gpu_seconds": lambda result: result.by_gpu_seconds,
}
FLEET_GPUS = 10_000


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=6000, help="per tier, cell and seed")
    parser.add_argument("--seeds", type=int, default=3, help="streams that are averaged")
    parser.add_argument("--quick", action="store_true", help="1500 requests, one seed")
    parser.add_argument("--no-scaling", action="store_true", help="without tests/bench/burst.py")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.seeds = 1500, 1
    return options


def print_tier(work: Work, results: Results) -> None:
    """Print a row for each cell: attainment by requests / by GPU seconds, in percent."""
    print(f"\n{work.tier}: {work.num_replicas} replicas, requests of {work.costs_s} s")
    print("percent of the requests / of their GPU seconds that met their deadline")
    names = ["ours", "best_bounded", "preemptive_estimate", "preemptive_bound"]
    names[1:1] = [shown for name in SHOWN for shown in (name, f"{name}+bound")]
    print("slack load  " + "  ".join(f"{short(name):>11}" for name in names))
    for cell, by_tier in results.items():
        row = by_tier[work.tier]
        pairs = [
            f"{100 * row[n].by_requests:5.1f}/{100 * row[n].by_gpu_seconds:5.1f}" for n in names
        ]
        print(f"{cell.scale:5g} {cell.load:4.0%}  " + "  ".join(pairs))


def short(name: str) -> str:
    """Return a policy's name shortened to a column's head."""
    for long, brief in (
        ("round_robin", "robin"),
        ("power_of_two", "two"),
        ("least_requests", "count"),
        ("least_work", "work"),
        ("best_bounded", "best bound"),
        ("preemptive_", "pre. "),
    ):
        name = name.replace(long, brief)
    return name


def print_margins(results: Results) -> None:
    """Print by how much ours is ahead of the best opponent in each cell, or where it is below."""
    print("\npoints ahead of the best opponent, its bound searched for (requests / GPU seconds)")
    for cell, by_tier in results.items():
        parts = []
        for tier, row in by_tier.items():
            margins = [
                100 * (measure(row["ours"]) - measure(row["best_bounded"]))
                for measure in MEASURES.values()
            ]
            flag = " BELOW" if min(margins) < -0.005 else ""
            parts.append(f"{tier} {margins[0]:+5.2f}/{margins[1]:+5.2f}{flag}")
        print(f"{cell.scale:5g} {cell.load:4.0%}  " + "   ".join(parts))


def noise_figures(num: int, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the attainment at 95 % load if the router's estimates are off by a random factor."""
    print("\nestimates off by a lognormal factor, 95 % load (requests / GPU seconds)")
    print("slack noise         ours  ours, reports   work+bound")
    figures: dict[str, dict[str, float]] = {}
    for scale in SCALES:
        for noise in NOISES:
            row: list[list[Attained]] = [[], [], []]
            for work in WORKS:
                cell = Cell(scale, 0.95)
                streams = [arrivals_of(work, cell, num, seed, noise) for seed in seeds]
                period_s = work.costs_s[0] / 10
                row[0].append(attained(work, streams, OURS))
                row[1].append(attained(work, streams, OURS, period_s))
                bounds = (wait * work.mean_s for wait in WAITS)
                grid = [
                    attained(work, streams, lambda b=b: EarlyBinding(least_work(), bound_s=b))
                    for b in bounds
                ]
                row[2].append(best(grid))
            means = [mean(column) for column in row]
            cells = [f"{100 * m.by_requests:5.1f}/{100 * m.by_gpu_seconds:5.1f}" for m in means]
            print(f"{scale:5g} {noise:5.0%}  " + "    ".join(cells))
            figures.setdefault(f"{scale:.1f}", {})[f"{noise:g}"] = round(means[0].by_requests, 4)
    return figures


def fleet_figures() -> dict[str, float]:
    """Return the wall time of simulating 100,000 requests to a large fleet, at two loads."""
    figures = {}
    num = 100_000
    work = Work(KLEIN.tier, FLEET_GPUS, KLEIN.costs_s)
    for load in (0.95, 1.2):
        stream = arrivals_of(work, Cell(2.0, load), num, 0)
        begin = time.perf_counter()
        simulate(stream, [ReplicaPool(work.tier, TierQueue(), work.num_replicas)])
        wall_s = time.perf_counter() - begin
        figures[f"million_requests_s_at_{load:g}"] = round(wall_s * 1e6 / num, 1)
    print(f"\n{FLEET_GPUS} GPUs, a million requests, by a tenth of them: {figures}")
    return figures


def gpu_hours() -> dict[str, float]:
    """Return the GPU hours of the autoscaling bench (burst.py)."""
    try:
        from tests.bench.burst import burst_figures
    except ImportError:
        return {}
    return burst_figures()


def slo_figures(results: Results, measure: Callable[[Attained], float]) -> dict[str, object]:
    """Return a measure by scale and load, as the mean of the two tiers."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for cell, by_tier in results.items():
        names = next(iter(by_tier.values()))
        figures.setdefault(f"{cell.scale:.1f}", {})[f"{cell.load:.2f}"] = {
            name: round(measure(mean([row[name] for row in by_tier.values()])), 4) for name in names
        }
    return dict(figures)


def main() -> None:
    options = read_options()
    seeds = range(options.seeds)
    results: Results = {}
    for scale in SCALES:
        for load in LOADS:
            cell = Cell(scale, load)
            results[cell] = {
                work.tier: cell_results(work, cell, options.requests, seeds) for work in WORKS
            }
    for work in WORKS:
        print_tier(work, results)
    print_margins(results)
    figures = {name: slo_figures(results, measure) for name, measure in MEASURES.items()}
    figures["slo_with_wrong_estimates"] = dict(noise_figures(options.requests, seeds))
    figures["fleet"] = dict(fleet_figures())
    figures["gpu_hours"] = {} if options.no_scaling else dict(gpu_hours())
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
