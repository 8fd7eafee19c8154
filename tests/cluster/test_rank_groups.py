"""Replicas of two and three ranks under leaving clients, kills, stops and errors lose no image.

The drills also check how soon they serve again; for that nothing else may run on the machine.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.conftest import DEPLOYED, PATIENCE_S, Replica, backlog, deploy, wait_until
from tests.cluster.faulty_rank import BUG, OUT_OF_MEMORY
from tests.cluster.groups import TIER, group_with, wait_until_running
from tests.cluster.random_klein import save_random_klein
from tests.cluster.storm import PROMPT, Generate, storm

LONG_JOB = {"size": "192x192", "steps": 30}
KILLED_LIMIT_S, HUNG_LIMIT_S = 10, 15
START_SHARE = 1.25
Replicas = Callable[[str], list[Replica]]


class Client(threading.Thread):
    """A client that sends one request from a thread of its own."""

    def __init__(self, generate: Generate, prompt: str, **fields: object) -> None:
        super().__init__()
        self._ask = lambda: generate(prompt, **fields)
        self.images: list[bytes] | None = None
        self.answered_at = math.inf
        self.start()

    def run(self) -> None:
        self.images = self._ask()
        self.answered_at = time.monotonic()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(2, id="2 ranks"),
        # Three ranks take long to start.
        pytest.param(3, id="3 ranks", marks=pytest.mark.slow),
    ],
)
def num_ranks(
    request: pytest.FixtureRequest,
    address: str,
    config: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[int]:
    """Deploy the tier with so many ranks; with two it is deployed from the beginning."""
    args: dict[str, Any] = {}
    if request.param == 3:
        args = {"weights": str(tmp_path_factory.mktemp("klein") / "weights")}
        args["parallel"] = {"tensor": request.param}
        save_random_klein(Path(args["weights"]))
    with group_with(config, deploy, stays=True, **args):
        yield request.param


@pytest.mark.parametrize(
    ("seconds", "num_runs"), [(4, 1), pytest.param(12, 3, marks=pytest.mark.slow)]
)
def test_clients_that_leave_disturb_nobody(
    address: str,
    num_ranks: int,
    replicas: Replicas,
    generate: Generate,
    seconds: float,
    num_runs: int,
) -> None:
    """A storm and not one client: it takes chance for a call to be dropped on one rank only."""
    before = replicas(TIER)
    assert [len(replica.ranks) for replica in before] == [num_ranks]
    for _ in range(num_runs):
        num_images = storm(address, seconds, generate, tier=TIER, num_bystanders=4)
        print(f"\n{num_ranks} ranks: {num_images} images in {seconds} s, all of them right")
        assert num_images >= 4
    assert replicas(TIER) == before, "no replica was replaced meanwhile"


@pytest.fixture
def replica(num_ranks: int, replicas: Replicas) -> Iterator[Replica]:
    """Yield the replica to break; check afterwards that exactly one other has taken its place."""
    import ray

    def taken() -> float:
        return ray.available_resources().get("CPU", 0.0)

    (old,) = replicas(TIER)
    assert len(old.ranks) == num_ranks
    before = taken()
    yield old
    _, alive = psutil.wait_procs(old.processes, timeout=PATIENCE_S)
    assert not alive, "nothing of the old replica is left over"
    (new,) = replicas(TIER)
    assert len(new.ranks) == num_ranks
    wait_until(lambda: taken() == before, what="its CPUs back")


def break_one(replica: Replica, how: str) -> None:
    """Kill or stop the last rank or the leader, as `how` says."""
    broken = replica.ranks[-1] if how.endswith("rank") else replica.leader
    broken.send_signal(signal.SIGSTOP if "stopped" in how else signal.SIGKILL)


def break_and_generate(replica: Replica, generate: Generate, how: str) -> float:
    """Break a replica and return the seconds to the next image.

    At that moment one request is running, one waits, and one comes soon after.
    """
    generated = generate(PROMPT, model=TIER, seed=5, **LONG_JOB)
    small = generate(PROMPT, model=TIER, seed=1)
    in_flight = Client(generate, PROMPT, model=TIER, seed=5, **LONG_JOB)
    wait_until(lambda: sum(backlog(TIER)) > 0, what="an image being drawn")
    waiting = Client(generate, PROMPT, model=TIER, seed=1)

    break_one(replica, how)
    began = time.monotonic()
    later = Client(generate, PROMPT, model=TIER, seed=1)
    for client in (in_flight, waiting, later):
        client.join()
    assert in_flight.images == generated
    assert waiting.images == later.images == small
    recovery_s = min(client.answered_at for client in (in_flight, waiting, later)) - began
    print(f"\n{how}: served again after {recovery_s:.1f} s")
    return recovery_s


@pytest.mark.parametrize(
    "how",
    [
        "a killed rank",
        pytest.param("a stopped rank", marks=pytest.mark.slow),
        pytest.param("a killed leader", marks=pytest.mark.slow),
        pytest.param("a stopped leader", marks=pytest.mark.drill),
    ],
)
def test_a_broken_process_is_replaced_and_no_image_is_lost(
    replica: Replica, generate: Generate, how: str
) -> None:
    break_and_generate(replica, generate, how)


def fail_and_generate(generate: Generate, order: Path, failure: str) -> float:
    """Let one rank fail, and return the seconds to the image that it failed at."""
    expected = generate(str(order), model=TIER, seed=3)
    order.write_text(failure)
    began = time.monotonic()
    assert generate(str(order), model=TIER, seed=3) == expected
    recovery_s = time.monotonic() - began
    assert not order.exists()
    print(f"\n{failure}: drawn elsewhere after {recovery_s:.1f} s")
    return recovery_s


def test_an_error_on_one_rank_only_costs_no_image(
    replica: Replica, generate: Generate, tmp_path: Path
) -> None:
    fail_and_generate(generate, tmp_path / "order", BUG)


def test_a_request_that_takes_too_much_memory_ends_one_group_and_no_second_one(
    address: str, replica: Replica, generate: Generate, tmp_path: Path
) -> None:
    order = tmp_path / "order"
    expected = generate(str(order), model=TIER, seed=3)
    order.write_text(OUT_OF_MEMORY)
    fields = {"model": TIER, "prompt": str(order), "seed": 3}
    answer = httpx.post(f"{address}/v1/images/generations", json=fields, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "out_of_memory")
    assert answer.headers["x-should-retry"] == "false"
    assert not order.exists()
    assert generate(str(order), model=TIER, seed=3) == expected


@pytest.fixture(scope="module")
def start_s(num_ranks: int) -> float:
    """Return the seconds in which the replica starts if nothing is broken."""
    again = copy.deepcopy(DEPLOYED)
    (application,) = (app for app in again["applications"] if app["name"] == TIER)
    application["args"]["load_timeout_s"] = 601.0
    began = time.monotonic()
    deploy(again)
    wait_until_running()
    return time.monotonic() - began


@pytest.mark.drill
@pytest.mark.parametrize(
    ("how", "limit_s"),
    [
        ("a killed rank", KILLED_LIMIT_S),
        ("a stopped rank", HUNG_LIMIT_S),
        ("a killed leader", KILLED_LIMIT_S),
    ],
)
def test_a_broken_process_is_replaced_within_seconds(
    start_s: float, replica: Replica, generate: Generate, how: str, limit_s: float
) -> None:
    assert break_and_generate(replica, generate, how) < allowed_s(limit_s, start_s), start_s


@pytest.mark.drill
def test_an_error_on_one_rank_only_costs_seconds(
    start_s: float, replica: Replica, generate: Generate, tmp_path: Path
) -> None:
    took_s = fail_and_generate(generate, tmp_path / "order", BUG)
    assert took_s < allowed_s(KILLED_LIMIT_S, start_s), start_s


def allowed_s(limit_s: float, start_s: float) -> float:
    """Return `limit_s`, or more if a replica takes long to start even when nothing is broken."""
    return limit_s + max(0.0, START_SHARE * start_s - KILLED_LIMIT_S)
