"""A node is drained behind a load balancer, with more or less notice."""

import shutil
from pathlib import Path

import pytest

from tests.cluster.conftest import figures_of_program
from tests.cluster.test_make_serve import environment_of_serve

NEEDS_HAPROXY = pytest.mark.skipif(
    shutil.which("haproxy") is None, reason="needs haproxy: apt-get install haproxy"
)


@pytest.mark.drill
@NEEDS_HAPROXY
@pytest.mark.parametrize("notice_s", [30, 70, 1500])
def test_a_node_that_is_drained_fails_nobody(notice_s: int, tmp_path: Path) -> None:
    env = environment_of_serve(tmp_path) | {"FORWARDED_ALLOW_IPS": "127.0.0.1"}
    figures = figures_of_program("tests.cluster.drained_node", str(notice_s), env=env)
    print(f"\n{notice_s} s of notice: {figures}")
    assert figures["num_sent"] >= 50
    assert figures["num_failed"] == 0
    assert figures["num_unready"] == 0


@pytest.mark.drill
@NEEDS_HAPROXY
def test_a_worker_that_is_stopped_fails_nobody(tmp_path: Path) -> None:
    """`systemctl stop flux-ray-worker`: at SIGTERM it drains its node, then it ends."""
    env = environment_of_serve(tmp_path) | {"FORWARDED_ALLOW_IPS": "127.0.0.1"}
    figures = figures_of_program("tests.cluster.stopped_node", "300", env=env)
    print(f"\nSIGTERM: {figures}")
    assert figures["num_sent"] >= 50
    assert figures["num_failed"] == 0
    assert figures["num_unready"] == 0
    assert figures["left_s"] < 300
