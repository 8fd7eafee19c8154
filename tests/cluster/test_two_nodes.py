"""A group that is larger than a node."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_group_over_two_nodes_draws_the_same_and_outlives_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.two_nodes"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Ray writes there too.
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    figures = json.loads(line)
    assert figures["num_nodes"] == 2
    assert figures["difference"] <= 1
    assert figures["again"]
