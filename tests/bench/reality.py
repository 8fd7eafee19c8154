"""Compare the simulator with a real local cluster: the same trace, and the same order of policies.

The simulator gets the seconds that each request really took in its replica, and simulates the
waiting. In the column `apart` it gets the seconds of similar requests from before instead, measured
with as many clients as there are replicas. There are three setups. `tiny` has one replica, since
two would take both CPUs from everything else. `pair` has two, to compare the order of policies.
`paced` has leaders that sleep for their steps, so that the CPUs of this machine do not matter. The
last line is one JSON object, in which `order` is that of the pair. `--only NAME` runs one setup.
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"
# Ray's workers have to find the modules of this folder by their full names.
os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])

from tests.bench.reality_replay import measure, replay
from tests.bench.reality_serve import Cluster, cluster
from tests.bench.reality_work import OURS, POLICIES, SHAPES, Costs, Played, play, trace_of

# One policy is better than another if they differ by APART standard errors. These are of means over
# PIECE requests, since requests next to each other in the trace share their luck.
APART = 2.0
PIECE = 20


Figures = dict[str, dict[str, object]]


@dataclass(frozen=True)
class Setup:
    """A setup: the number of replicas, the load as a share of their capacity, and the duration."""

    name: str
    num_replicas: int
    load: float
    duration_s: float
    is_paced: bool


SETUPS = (
    Setup("tiny", 1, 0.7, 180.0, is_paced=False),
    Setup("pair", 2, 0.7, 120.0, is_paced=False),
    Setup("paced", 4, 0.85, 90.0, is_paced=True),
)


def figures_of(real: Played, simulated: Played, apart: Played) -> dict[str, dict[str, float]]:
    """Return the latencies of requests that were served, and the number of rejected ones."""
    figures = {}
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        pair = {"real": real.quantile(share), "simulated": simulated.quantile(share)}
        ratio_apart = apart.quantile(share) / pair["real"]
        ratio = pair["simulated"] / pair["real"]
        figures[name] = pair | {"ratio": ratio, "ratio_apart": ratio_apart}
    figures["refused"] = {"real": real.num_refused, "simulated": simulated.num_refused}
    return figures


def reality(setup: Setup, costs: Costs, place: Cluster) -> dict[str, dict[str, float]]:
    """Send a trace through our gateway and through the simulator; half of it has a deadline."""
    trace = trace_of(costs, setup.load, setup.num_replicas, setup.duration_s, slack=4.0, said=0.5)
    real = replay(place.url(OURS), trace)
    simulated = play(trace, costs, OURS, setup.num_replicas, real.services_s)
    figures = figures_of(real, simulated, play(trace, costs, OURS, setup.num_replicas))
    print(f"\n{setup.name}: {len(trace)} requests, {setup.num_replicas} replicas, {setup.load:.0%}")
    print(f"{'':8} {'real':>8} {'simulated':>10} {'ratio':>6} {'apart':>6}")
    for name, each in figures.items():
        ratios = f"{each['ratio']:6.2f} {each['ratio_apart']:6.2f}" if "ratio" in each else ""
        print(f"{name:8} {each['real']:8.3f} {each['simulated']:10.3f} {ratios}")
    return figures


def order(setup: Setup, costs: Costs, place: Cluster) -> dict[str, object]:
    """Send a trace through every policy, with deadlines of twice the unloaded latency."""
    trace = trace_of(costs, setup.load, setup.num_replicas, setup.duration_s, slack=2.0, said=1.0)
    real = {name: replay(place.url(name), trace) for name in POLICIES}
    simulated = {name: play(trace, costs, name, setup.num_replicas) for name in POLICIES}
    print(f"\n{setup.name}: deadlines met   of requests      of seconds")
    print(f"{'':20} {'real':>6} {'simulated':>9} {'real':>6} {'simulated':>9}")
    for name in POLICIES:
        print(
            f"{name:20} {real[name].attainment():6.3f} {simulated[name].attainment():9.3f}"
            f" {real[name].attainment(costs):6.3f} {simulated[name].attainment(costs):9.3f}"
        )
    by_requests = {
        "real": {name: played.attainment() for name, played in real.items()},
        "simulated": {name: played.attainment() for name, played in simulated.items()},
    }
    apart = {"real": told_apart(real), "simulated": told_apart(simulated)}
    is_same = is_same_order(apart["real"], apart["simulated"])
    both = apart["real"] & apart["simulated"]
    print(
        f"{len(trace)} requests tell {len(apart['real'])} pairs apart here,"
        f" {len(apart['simulated'])} simulated, {len(both)} in both; the same order: {is_same}"
    )
    by_seconds = {
        "real": {name: played.attainment(costs) for name, played in real.items()},
        "simulated": {name: played.attainment(costs) for name, played in simulated.items()},
    }
    return {
        **by_requests,
        "is_same": is_same,
        "pairs_told_apart": {
            place: [f"{better} > {worse}" for better, worse in sorted(pairs)]
            for place, pairs in apart.items()
        },
        "by_gpu_seconds": by_seconds,
    }


Pairs = set[tuple[str, str]]


def told_apart(played: Mapping[str, Played]) -> Pairs:
    """Return the (better, worse) pairs of policies that differ significantly on these requests."""
    return {
        (better, worse)
        for better, worse in itertools.permutations(played, 2)
        if is_better(played[better].met, played[worse].met)
    }


def is_better(one: Sequence[bool], other: Sequence[bool]) -> bool:
    """Return whether `one` has significantly more true values than `other`, pair by pair."""
    ahead = [a - b for a, b in zip(one, other, strict=True)]
    pieces = [fmean(ahead[at : at + PIECE]) for at in range(0, len(ahead) - PIECE + 1, PIECE)]
    if len(pieces) < 2:
        return False
    return fmean(pieces) > APART * stdev(pieces) / math.sqrt(len(pieces))


def is_same_order(real: Pairs, simulated: Pairs) -> bool:
    """Return whether ours is first in both, and no pair is the other way round in one of them."""
    is_ours_first = all(
        (OURS, name) in pairs for pairs in (real, simulated) for name in POLICIES if name != OURS
    )
    return is_ours_first and not any((worse, better) in simulated for better, worse in real)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[setup.name for setup in SETUPS])
    parser.add_argument("--no-order", action="store_true", help="only ours: a minute each")
    options = parser.parse_args()
    figures: Figures = {}
    for setup in SETUPS:
        if options.only not in (None, setup.name):
            continue
        has_order = setup.num_replicas > 1 and not options.no_order
        with cluster(setup.num_replicas, is_paced=setup.is_paced, has_opponents=has_order) as place:
            costs = measure(place.url(OURS), setup.num_replicas)
            for shape, measured in costs.items():
                print(f"{shape}: {measured.cost_s:.3f} s alone, {measured.unloaded_s:.3f} s in all")
            print(f"{costs[SHAPES[0]].between_s * 1000:.1f} ms from one to the next")
            figures[setup.name] = {"reality": reality(setup, costs, place)}
            if has_order:
                figures[setup.name]["order"] = order(setup, costs, place)
    print(json.dumps(report_of(figures)))


def report_of(figures: Figures) -> dict[str, object]:
    """Return the figures with the two that answer the bench's questions first."""
    return {
        "reality": figures.get("tiny", {}).get("reality"),
        "order": figures.get("pair", {}).get("order"),
        **{name: each for name, each in figures.items() if name != "tiny"},
    }


if __name__ == "__main__":
    main()
