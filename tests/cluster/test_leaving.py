"""Clients that leave in mid-request disturb nobody. Rank groups have storms of their own."""

import time
from collections.abc import Callable

import pytest

from tests.cluster.conftest import Replica
from tests.cluster.storm import PROMPT, Draw, leave_after, storm

LONG_JOB = {"model": "tiny", "prompt": "a ring", "size": "192x192", "n": 4, "steps": 50}


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_storm_of_leavers_disturbs_no_bystander(
    address: str, draw: Draw, replicas: Callable[[str], list[Replica]], seconds: float
) -> None:
    before = replicas("tiny")
    assert storm(address, seconds, draw, tier="tiny", num_bystanders=1) >= 3
    assert replicas("tiny") == before, "the replica was not replaced meanwhile"


def test_a_long_job_ends_when_its_client_leaves(address: str, draw: Draw) -> None:
    began = time.monotonic()
    draw("a ring", size="192x192", steps=50)
    alone_s = time.monotonic() - began
    leave_after(address, 0.5, LONG_JOB)
    began = time.monotonic()
    draw(PROMPT)
    waited_s = time.monotonic() - began
    assert waited_s < 2 * alone_s, "four times as long a job held the ranks"
