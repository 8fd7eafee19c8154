"""Turns, deadlines and scaling by the ledger, on a real Serve."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.conftest import Replica, deploy, is_ready, wait_until
from tests.cluster.groups import TIER, group_with
from tests.cluster.storm import PROMPT, Draw

LONG = {"size": "192x192", "steps": 20, "n": 4}
RECOVERY_S = 10
# What a busy machine may add to an answer.
SLOW_S = 10
Replicas = Callable[[str], list[Replica]]


def ask(address: str, deadline_s: float, **fields: object) -> httpx.Response:
    return httpx.post(
        f"{address}/v1/images/generations",
        json={"model": "tiny", "prompt": PROMPT, **fields},
        headers={"x-flux-deadline-s": f"{deadline_s}"},
        timeout=60,
    )


def backlog(tier: str) -> tuple[float, float]:
    """GPU seconds that the ledger has waiting and running."""
    import ray

    from flux_ray.router.ledger_actor import start_ledger

    waiting_s, running_s, _ = ray.get(start_ledger().backlog.remote(tier), timeout=10)
    return waiting_s, running_s


def test_what_cannot_be_done_in_time_is_refused_at_once(address: str, draw: Draw) -> None:
    draw(PROMPT, **LONG)
    began = time.monotonic()
    answer = ask(address, 0.05, **LONG)
    assert time.monotonic() - began < 1
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "deadline_too_short"
    assert ask(address, 30).status_code == 200


def test_what_would_wait_too_long_is_refused_until_it_would_not(address: str, draw: Draw) -> None:
    """`Retry-After` is honest: by then the same request is taken."""
    for _ in range(3):
        draw(PROMPT, **LONG)
    others = [threading.Thread(target=draw, args=(PROMPT,), kwargs=LONG) for _ in range(3)]
    for other in others:
        other.start()
    time.sleep(0.3)
    # The first of them alone takes a second on a fast machine.
    refused = ask(address, 0.4)
    assert refused.status_code == 429, "three times some seconds are before it"
    time.sleep(int(refused.headers["retry-after"]))
    assert ask(address, 0.4).status_code == 200
    for other in others:
        other.join()


def test_a_lost_ledger_costs_nothing_and_leaves_nothing(address: str, draw: Draw) -> None:
    import ray

    from flux_ray.router.ledger_actor import start_ledger

    expected = draw(PROMPT, seed=3, **LONG)
    answers: list[list[bytes]] = []

    def keep_drawing() -> None:
        answers.append(draw(PROMPT, seed=3, **LONG))

    clients = [threading.Thread(target=keep_drawing) for _ in range(3)]
    for client in clients:
        client.start()
    time.sleep(0.5)
    ray.kill(start_ledger(), no_restart=False)
    for client in clients:
        client.join(60)
    assert answers == [expected] * 3
    wait_until(lambda: backlog("tiny") == (0.0, 0.0), timeout_s=RECOVERY_S, what="a ledger at zero")


def test_a_ledger_that_hangs_breaks_no_deadline_and_is_replaced(address: str, draw: Draw) -> None:
    """Stopped it answers nobody, and does not die by itself."""
    from ray._private.state import state

    def ledgers() -> set[int]:
        actors = state.actor_table(None, actor_state_name="ALIVE").values()
        return {actor["Pid"] for actor in actors if actor["ActorClassName"] == "LedgerActor"}

    draw(PROMPT)
    [hung] = ledgers()
    psutil.Process(hung).suspend()
    began = time.monotonic()
    refused = ask(address, 3)
    assert refused.status_code == 429, refused.text
    assert int(refused.headers["retry-after"]) > 0
    assert time.monotonic() - began < 5 + SLOW_S
    assert draw(PROMPT)
    wait_until(lambda: ledgers() and hung not in ledgers(), timeout_s=60, what="another ledger")


@pytest.mark.parametrize("how", ["left", "gateway", "tiny"])
def test_no_phantom_work_stays_behind(
    address: str, draw: Draw, replicas: Replicas, how: str
) -> None:
    """Clients that leave, and a gateway or a replica that dies with all it had."""
    clients = [
        threading.Thread(target=httpx_quietly, args=(address, how == "left")) for _ in range(4)
    ]
    for client in clients:
        client.start()
    wait_until(lambda: sum(backlog("tiny")) > 0, timeout_s=5, what="work in the ledger")
    if how != "left":
        (dying,) = replicas(how)
        dying.leader.kill()
    for client in clients:
        client.join(60)
    wait_until(lambda: backlog("tiny") == (0.0, 0.0), timeout_s=RECOVERY_S, what="a ledger at zero")
    wait_until(lambda: is_ready(address), timeout_s=60, what="a gateway that serves")
    assert draw(PROMPT)


def httpx_quietly(address: str, leaves: bool) -> None:
    """A request whose answer, if any, does not matter."""
    with contextlib.suppress(httpx.TransportError):
        httpx.post(
            f"{address}/v1/images/generations",
            json={"model": "tiny", "prompt": PROMPT, **LONG},
            timeout=0.7 if leaves else 30,
        )


def test_a_tier_scales_from_nothing_by_gpu_seconds_and_back(
    config: dict[str, Any], draw: Draw, replicas: Replicas
) -> None:
    """The first request waits for a replica, and many for a second one; none is lost."""
    scaling = {
        "min_replicas": 0,
        "max_replicas": 2,
        "target_wait_s": 0.5,
        "cold_start_s": 1,
        "idle_s": 4,
    }
    with group_with(config, deploy, parallel={"tensor": 1}, autoscaling=scaling):
        wait_until(lambda: not replicas(TIER), timeout_s=60, what="no replica when nobody asks")
        assert len(draw(PROMPT, model=TIER, seed=1)) == 1
        answers: list[int] = []
        clients = [
            threading.Thread(target=lambda: answers.append(len(draw(PROMPT, model=TIER, **LONG))))
            for _ in range(10)
        ]
        for client in clients:
            client.start()
        wait_until(lambda: len(replicas(TIER)) == 2, timeout_s=60, what="a second replica")
        for client in clients:
            client.join(60)
        assert answers == [4] * 10
        wait_until(lambda: not replicas(TIER), timeout_s=60, what="none again")
