"""A replica whose rank or leader is killed comes back whole, and nothing of it is left over."""

import threading
from collections.abc import Callable

import httpx
import psutil
import pytest

PROMPT = "a red circle on a blue background"
RECOVERY_S = 60
Processes = Callable[[str], list[psutil.Process]]


class Client(threading.Thread):
    """One request that runs for seconds."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        self.answer: httpx.Response | None = None

    def run(self) -> None:
        self.answer = httpx.post(
            f"{self.address}/v1/images/generations",
            json={"model": "tiny", "prompt": PROMPT, "size": "192x192", "steps": 50, "n": 8},
            timeout=RECOVERY_S,
        )


@pytest.mark.parametrize(
    "victim", ["RankActor", pytest.param("ServeReplica:tiny", marks=pytest.mark.slow)]
)
def test_a_killed_process_costs_a_request_nothing_but_time(
    address: str, processes: Processes, draw: Callable[..., list[bytes]], victim: str
) -> None:
    (rank,) = processes("RankActor")
    (leader,) = processes("ServeReplica:tiny")
    before = draw(PROMPT, seed=1)
    client = Client(address)
    client.start()
    client.join(0.7)
    assert client.is_alive(), "the request is in flight"

    processes(victim)[0].kill()
    client.join(RECOVERY_S)

    assert client.answer is not None
    assert client.answer.status_code == 200, client.answer.text
    assert draw(PROMPT, seed=1) == before
    _, alive = psutil.wait_procs([rank, leader], timeout=10)
    assert not alive, "nothing of the old replica is left over"
    assert len(processes("RankActor")) == len(processes("ServeReplica:tiny")) == 1
