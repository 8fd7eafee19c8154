"""A process that is stopped, as if it hung, is killed within seconds and replaced."""

import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.cluster.casualties import (
    HEADER,
    Clients,
    clients,
    processes_of,
    strike,
    wait_until_whole,
)
from tests.cluster.conftest import PATIENCE_S, deploy
from tests.cluster.groups import group_with

LIMIT_S = 15


@pytest.fixture
def asking(address: str) -> Iterator[Clients]:
    with clients(address) as asking:
        yield asking


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["leader", "rank", "gateway", "ledger", "controller"])
def test_a_stopped_process_is_ended_and_replaced(asking: Clients, kind: str) -> None:
    ranks = processes_of("rank") if kind in ("leader", "rank") else []
    casualty = strike(asking, (kind,), signal.SIGSTOP)
    print(f"\n{HEADER}\n{casualty}")
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_S)
    assert not alive, "nothing of its group keeps a card"
    assert casualty.gone_s < LIMIT_S
    # Requests that were on their way through the killed gateway have failed.
    assert casualty.num_failed <= (2 if kind == "gateway" else 0)


@pytest.mark.drill
def test_a_stopped_text_encoder_is_ended_and_replaced(address: str, config: dict[str, Any]) -> None:
    with group_with(config, deploy, text_encoder="shared"), clients(address) as asking:
        casualty = strike(asking, ("text encoder",), signal.SIGSTOP)
        print(f"\n{HEADER}\n{casualty}")
    assert casualty.gone_s < LIMIT_S


@pytest.mark.drill
def test_ranks_end_when_nobody_ends_their_stopped_leader(address: str) -> None:
    """This is how a leader looks that is cut off: those who would kill it are stopped too."""
    (leader,) = processes_of("leader")
    (ledger,) = processes_of("ledger")
    (controller,) = processes_of("controller")
    (gateway,) = processes_of("gateway")
    ranks = processes_of("rank")
    others = (ledger, controller, gateway)
    for process in (*others, leader):
        process.suspend()
    try:
        _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_S)
        assert not alive
        assert leader.status() == psutil.STATUS_STOPPED, "it was not ended before them"
    finally:
        for process in others:
            process.resume()
        leader.kill()
    wait_until_whole({"leader": {leader}, "rank": set(ranks)})
