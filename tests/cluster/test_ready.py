"""What load balancers and strangers see of a real cluster: readiness, removed tiers, open ports."""

import copy
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from tests.cluster.conftest import PATIENCE_S, Replica, deploy, wait_until
from tests.cluster.groups import TIER, wait_until_running
from tests.cluster.storm import PROMPT

ANY_ADDRESS = {"0.0.0.0", "::"}
WATCHED_S = 10.0
# The limit for the answer to a request for a removed tier, which once waited for ten minutes.
SOON_S = 30.0


def num_open_ports(process: psutil.Process) -> int:
    """Return how many ports of a process listen on all interfaces."""
    listening = [
        each.laddr.ip
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    return sum(host in ANY_ADDRESS for host in listening)


def test_ranks_open_no_port_to_all_but_ray_s_own(
    replicas: Callable[[str], list[Replica]],
) -> None:
    @ray.remote(num_cpus=0)
    def plain() -> int:
        return num_open_ports(psutil.Process(os.getpid()))

    of_ray = ray.get(plain.remote(), timeout=PATIENCE_S)
    for tier in ("tiny", TIER):
        for replica in replicas(tier):
            assert [num_open_ports(rank) for rank in replica.ranks] == [of_ray] * len(replica.ranks)


class Watch(threading.Thread):
    """A thread that asks `/readyz` all the time, and keeps what is no 200 and the longest wait."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._url = f"{address}/readyz"
        self._end = threading.Event()
        self.others: list[str] = []
        self.slowest_s = 0.0

    def run(self) -> None:
        while not self._end.wait(0.05):
            began = time.monotonic()
            answer = httpx.get(self._url, timeout=PATIENCE_S)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            if answer.status_code != 200:
                self.others.append(answer.text)

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self.join()


def controller() -> int:
    """Return the process id of Serve's controller."""
    handle = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    pid: int = ray.get(handle.get_pid.remote(), timeout=PATIENCE_S)
    return pid


@pytest.mark.slow
def test_while_the_controller_starts_anew_the_gateway_stays_ready(
    address: str, generate: Callable[..., list[bytes]]
) -> None:
    old = controller()
    with Watch(address) as watch:
        psutil.Process(old).kill()
        generate(PROMPT)
        time.sleep(WATCHED_S)
        wait_until(lambda: controller() != old, what="a new controller")
        time.sleep(WATCHED_S)
        generate(PROMPT)
    assert watch.others == []


def ask(address: str, model: str) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT}
    return httpx.post(f"{address}/v1/images/generations", json=body, timeout=PATIENCE_S)


def is_marked_deployed(address: str) -> bool:
    models = httpx.get(f"{address}/v1/models", timeout=PATIENCE_S).json()["data"]
    return bool({each["id"]: each["deployed"] for each in models}[TIER])


@pytest.mark.slow
def test_a_tier_that_is_removed_is_refused_at_once_until_it_is_there_again(
    address: str, config: dict[str, Any]
) -> None:
    without = copy.deepcopy(config)
    without["applications"] = [each for each in config["applications"] if each["name"] != TIER]
    with Watch(address) as watch:
        deploy(without)
        wait_until(lambda: not is_marked_deployed(address), what="a tier that is gone")
        began = time.monotonic()
        refused = ask(address, TIER)
        assert time.monotonic() - began < SOON_S
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "tier_unavailable")
        assert ask(address, "studio").json()["model"] == "tiny"
        deploy(config)
        wait_until(lambda: is_marked_deployed(address), what="the tier again")
        # It is not ready yet, but deployed: a request waits for it.
        assert ask(address, TIER).status_code == 200
        wait_until_running()
    assert watch.others == []
