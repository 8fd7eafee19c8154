"""The ledger's queue, deadlines and scaling on a real Serve."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.conftest import PATIENCE_S, Replica, backlog, deploy, is_ready, wait_until
from tests.cluster.groups import TIER, group_with
from tests.cluster.storm import PROMPT, Generate, unread

LONG = {"size": "192x192", "steps": 20, "n": 4}
Replicas = Callable[[str], list[Replica]]


def ask(address: str, deadline_s: float, **fields: object) -> httpx.Response:
    return httpx.post(
        f"{address}/v1/images/generations",
        json={"model": "tiny", "prompt": PROMPT, **fields},
        headers={"x-flux-deadline-s": f"{deadline_s}"},
        timeout=PATIENCE_S,
    )


@contextlib.contextmanager
def long_jobs(generate: Generate, number: int) -> Iterator[list[threading.Thread]]:
    """Start so many long requests; when the `with` begins, one runs and the others wait."""
    clients = [
        threading.Thread(target=generate, args=(PROMPT,), kwargs=LONG) for _ in range(number)
    ]
    for client in clients:
        client.start()
    wait_until(lambda: backlog("tiny")[0] > 0, what="one that waits for another")
    yield clients
    for client in clients:
        client.join()


def test_what_cannot_be_done_in_time_is_refused_at_once(address: str, generate: Generate) -> None:
    generate(PROMPT, **LONG)
    with long_jobs(generate, 3) as others:
        answer = ask(address, 0.05, **LONG)
        assert any(other.is_alive() for other in others), "before those that came first are done"
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "deadline_too_short"
    assert ask(address, PATIENCE_S).status_code == 200


def test_what_would_wait_too_long_is_refused_until_it_would_not(
    address: str, generate: Generate
) -> None:
    """`Retry-After` is true: then, or soon after on a busy machine, the request is accepted."""
    for _ in range(3):
        generate(PROMPT, **LONG)
    began = time.monotonic()
    generate(PROMPT)
    # A deadline that fits the request itself, but not those that wait before it.
    deadline_s = max(0.4, 2 * (time.monotonic() - began))
    with long_jobs(generate, 3):
        refused = ask(address, deadline_s)
        assert refused.status_code == 429, "three times some seconds are before it"
        for num_tries in itertools.count(1):
            time.sleep(int(refused.headers["retry-after"]))
            refused = ask(address, deadline_s)
            if refused.status_code == 200:
                break
            assert (refused.status_code, num_tries < 5) == (429, True)


def test_a_lost_ledger_costs_nothing_and_leaves_nothing(address: str, generate: Generate) -> None:
    import ray

    from flux_ray.router.ledger.remote import start_ledger

    expected = generate(PROMPT, seed=3, **LONG)
    answers: list[list[bytes]] = []

    def keep_generating() -> None:
        answers.append(generate(PROMPT, seed=3, **LONG))

    clients = [threading.Thread(target=keep_generating) for _ in range(3)]
    for client in clients:
        client.start()
    wait_until(lambda: backlog("tiny")[0] > 0, what="work that waits for other work")
    ray.kill(start_ledger(), no_restart=False)
    for client in clients:
        client.join()
    assert answers == [expected] * 3
    wait_until(lambda: backlog("tiny") == (0.0, 0.0), what="a ledger at zero")


def test_a_ledger_that_hangs_breaks_no_deadline_and_is_replaced(
    address: str, generate: Generate
) -> None:
    """A stopped ledger answers nobody, and does not die by itself."""
    from ray._private.state import state

    def ledgers() -> set[int]:
        actors = state.actor_table(None, actor_state_name="ALIVE").values()
        return {actor["Pid"] for actor in actors if actor["ActorClassName"] == "LedgerActor"}

    generate(PROMPT)
    [hung] = ledgers()
    psutil.Process(hung).suspend()
    refused = ask(address, 3)
    assert refused.status_code == 429, refused.text
    assert int(refused.headers["retry-after"]) > 0
    assert hung in ledgers(), "the refusal did not wait for another"
    assert generate(PROMPT)
    wait_until(lambda: ledgers() and hung not in ledgers(), what="another ledger")


@pytest.mark.parametrize("how", ["left", "gateway", pytest.param("tiny", marks=pytest.mark.slow)])
def test_no_phantom_work_stays_behind(
    address: str, generate: Generate, replicas: Replicas, how: str
) -> None:
    """The ledger forgets the work of clients that leave, and of a gateway or replica that dies."""
    with contextlib.ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(unread(address, {"model": "tiny", "prompt": PROMPT, **LONG}))
        wait_until(lambda: sum(backlog("tiny")) > 0, what="work in the ledger")
        if how != "left":
            (dying,) = replicas(how)
            dying.leader.kill()
            wait_until(lambda: backlog("tiny") == (0.0, 0.0), what="a ledger at zero")
    wait_until(lambda: backlog("tiny") == (0.0, 0.0), what="a ledger at zero")
    wait_until(lambda: is_ready(address), what="a gateway that serves")
    assert generate(PROMPT)


@pytest.mark.slow
def test_a_tier_scales_from_nothing_by_gpu_seconds_and_back(
    config: dict[str, Any], generate: Generate, replicas: Replicas
) -> None:
    """The first request waits for a replica, many wait for a second one, and none is lost."""
    scaling = {
        "min_replicas": 0,
        "max_replicas": 2,
        "target_wait_s": 0.5,
        "cold_start_s": 1,
        "idle_s": 4,
    }
    with group_with(config, deploy, stays=True, parallel={"tensor": 1}, autoscaling=scaling):
        wait_until(lambda: not replicas(TIER), what="no replica when nobody asks")
        assert len(generate(PROMPT, model=TIER, seed=1)) == 1
        answers: list[int] = []
        clients = [
            threading.Thread(
                target=lambda: answers.append(len(generate(PROMPT, model=TIER, **LONG)))
            )
            for _ in range(10)
        ]
        for client in clients:
            client.start()
        wait_until(lambda: len(replicas(TIER)) == 2, what="a second replica")
        for client in clients:
            client.join()
        assert answers == [4] * 10
        wait_until(lambda: not replicas(TIER), what="none again")
