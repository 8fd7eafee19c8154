"""A Pod of the chart ends, with all that serves in it."""

from pathlib import Path

import pytest

from tests.cluster.conftest import figures_of_program
from tests.cluster.test_make_serve import environment_of_serve


@pytest.mark.drill
def test_a_pod_that_ends_fails_nobody(tmp_path: Path) -> None:
    """Its preStop has Serve move everything before it returns, and needs no more time than that."""
    env = environment_of_serve(tmp_path) | {"FORWARDED_ALLOW_IPS": "127.0.0.1"}
    figures = figures_of_program("tests.cluster.ended_pod", env=env)
    print(f"\n{figures}")
    assert figures["code"] == 0
    assert figures["told"].startswith("drained within")
    assert figures["num_left"] == 0
    assert figures["num_moved"] == 4
    assert figures["num_sent"] >= 10
    assert figures["num_failed"] == 0
