"""A fleet behind a load balancer is changed and broken under load, and nobody is failed."""

import shutil
from pathlib import Path

import pytest

from tests.cluster.conftest import figures_of_program
from tests.cluster.test_make_serve import environment_of_serve

COLUMNS = {
    "num_sent": "sent",
    "num_failed": "failed",
    "num_retried": "retried by clients",
    "num_resent": "by HAProxy",
    "num_unready": "/readyz not 200",
    "longest_gap_s": "longest gap, s",
    "slowest_s": "slowest, s",
    "whole_s": "whole after, s",
}


@pytest.mark.drill
@pytest.mark.skipif(
    not (shutil.which("haproxy") and shutil.which("redis-server")),
    reason="needs haproxy and redis-server: apt-get install haproxy redis-server",
)
def test_whatever_is_changed_or_lost_in_a_fleet_fails_nobody(tmp_path: Path) -> None:
    env = environment_of_serve(tmp_path) | {"FORWARDED_ALLOW_IPS": "127.0.0.1"}
    rows = figures_of_program("tests.cluster.fleet_drills", env=env, timeout_s=3600)
    print(f"\n| what | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(str(row[column]) for column in COLUMNS)} |")
    assert {name: row["failures"] for name, row in rows.items() if row["num_failed"]} == {}
    assert {name for name, row in rows.items() if row["num_unready"]} == set()
    assert all(row["num_sent"] >= 15 for row in rows.values())
