"""A node is drained behind a load balancer, with more or less notice."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT
from tests.cluster.test_make_serve import environment_of_serve

# Of all of it, the start of a cluster too.
LIMIT_S = 1200


@pytest.mark.drill
@pytest.mark.skipif(
    shutil.which("haproxy") is None, reason="needs haproxy: apt-get install haproxy"
)
@pytest.mark.parametrize("notice_s", [30, 70, 1500])
def test_a_node_that_is_drained_fails_nobody(notice_s: int, tmp_path: Path) -> None:
    told = environment_of_serve(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.drained_node", str(notice_s)],
        cwd=ROOT,
        env=told | {"FORWARDED_ALLOW_IPS": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    print(f"\n{notice_s} s of notice: {line}")
    figures = json.loads(line)
    assert figures["num_sent"] >= 50
    assert figures["num_failed"] == 0, done.stderr[-3000:]
    assert figures["num_unready"] == 0
