"""The simulator beside the cluster: what `tests/bench/reality.py` measures, held to its limits.

A drill: who else takes a processor meanwhile is in no simulation.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "reality.py"
MOST_OFF = 0.2
NUM_TRIES = 2


def figures_of(setup: str, *options: str) -> dict[str, Any]:
    """In a process of its own, for the Ray of this one is another."""
    run = subprocess.run(
        [sys.executable, BENCH, "--only", setup, *options],
        check=True,
        stdout=subprocess.PIPE,
        timeout=900,
    )
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return figures


def furthest_off() -> float:
    """Of median and 95th percentile, as a part of the real one."""
    latencies = figures_of("tiny")["reality"]
    return max(abs(latencies[name]["ratio"] - 1) for name in ("p50", "p95"))


@pytest.mark.drill
def test_latencies_are_those_that_were_simulated() -> None:
    tries = [furthest_off()]
    while min(tries) > MOST_OFF and len(tries) < NUM_TRIES:
        tries.append(furthest_off())
    assert min(tries) <= MOST_OFF, tries
