"""A gateway that Serve shuts down knows it at once, while it still answers requests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_replica_knows_that_it_ends_while_it_still_answers() -> None:
    command = [sys.executable, "-m", "tests.cluster.ending"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    # Ray may print further lines after it.
    assert "[false, true]" in ended.stdout.splitlines(), ended.stdout[-3000:]
