"""Clients that leave in mid-request disturb nobody else.

For tiers of several ranks, test_rank_groups.py has the same.
"""

from collections.abc import Callable

import pytest

from tests.cluster.conftest import Replica, backlog, wait_until
from tests.cluster.storm import PROMPT, Generate, storm, unread

LONG_JOB = {"model": "tiny", "prompt": "a ring", "size": "192x192", "n": 4, "steps": 50}


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_a_storm_of_leavers_disturbs_no_bystander(
    address: str, generate: Generate, replicas: Callable[[str], list[Replica]], seconds: float
) -> None:
    before = replicas("tiny")
    assert storm(address, seconds, generate, tier="tiny", num_bystanders=1) >= 3
    assert replicas("tiny") == before, "the replica was not replaced meanwhile"


def test_a_long_job_ends_when_its_client_leaves(
    address: str, generate: Generate, replicas: Callable[[str], list[Replica]]
) -> None:
    (replica,) = replicas("tiny")
    before_s = replica.busy_s()
    generate("a ring", size="192x192", steps=50)
    alone_s = replica.busy_s() - before_s
    with unread(address, LONG_JOB):
        wait_until(lambda: sum(backlog("tiny")) > 0, what="the job on its way")
    before_s = replica.busy_s()
    generate(PROMPT)
    assert replica.busy_s() - before_s < 2 * alone_s, "four times as long a job held the ranks"
