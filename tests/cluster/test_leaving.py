"""Clients that leave in mid-request disturb nobody."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

PROMPT = "a red circle on a blue background"
LONG_JOB = {"model": "tiny", "prompt": "a ring", "size": "192x192", "n": 4, "steps": 50}
NUM_LEAVERS = 4
Draw = Callable[..., list[bytes]]


def leave_after(address: str, seconds: float, fields: dict[str, object]) -> None:
    """Send a request, and hang up without reading the answer."""
    place = urlsplit(address)
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(seconds)


def storm(address: str, seconds: float, draw: Draw) -> int:
    """Leavers beside one client that waits for its answers; returns how many it got."""
    expected = draw(PROMPT, seed=1)
    end = time.monotonic() + seconds

    def keep_leaving(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < end:
            fields = {"model": "tiny", "prompt": "a ring", "steps": dice.choice([1, 4, 20])}
            leave_after(address, dice.uniform(0, 0.4), fields)

    leavers = [threading.Thread(target=keep_leaving, args=(i,)) for i in range(NUM_LEAVERS)]
    for leaver in leavers:
        leaver.start()
    answers = 0
    while time.monotonic() < end:
        assert draw(PROMPT, seed=1) == expected, "another client's picture, or a disturbed one"
        answers += 1
    for leaver in leavers:
        leaver.join()
    return answers


@pytest.mark.parametrize("seconds", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_a_storm_of_leavers_disturbs_no_bystander(
    address: str, draw: Draw, processes: Callable[[str], list], seconds: float
) -> None:
    ranks = processes("RankActor")
    assert storm(address, seconds, draw) >= 3
    assert processes("RankActor") == ranks, "the replica was not replaced meanwhile"


def test_a_long_job_ends_when_its_client_leaves(address: str, draw: Draw) -> None:
    began = time.monotonic()
    draw("a ring", size="192x192", steps=50)
    alone_s = time.monotonic() - began
    leave_after(address, 0.5, LONG_JOB)
    began = time.monotonic()
    draw(PROMPT)
    waited_s = time.monotonic() - began
    assert waited_s < 2 * alone_s, "four times as long a job held the ranks"
