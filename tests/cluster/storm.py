"""Clients that leave in mid-request, beside clients that wait for their pictures."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

PROMPT = "a red circle on a blue background"
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


def storm(address: str, seconds: float, draw: Draw, *, tier: str, num_bystanders: int) -> int:
    """How many pictures the bystanders got; AssertionError if one is not that of its seed."""
    expected = [draw(PROMPT, model=tier, seed=seed) for seed in range(num_bystanders)]
    end = time.monotonic() + seconds
    answers: list[bool] = []

    def keep_leaving(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < end:
            fields = {"model": tier, "prompt": "a ring", "steps": dice.choice([1, 4, 20])}
            streamed = dice.choice([{}, {"stream": True, "partial_images": 2}])
            leave_after(address, dice.uniform(0, 0.4), fields | streamed)

    def keep_drawing(seed: int) -> None:
        while time.monotonic() < end:
            try:
                answers.append(draw(PROMPT, model=tier, seed=seed) == expected[seed])
            except AssertionError:
                answers.append(False)
                raise

    threads = [threading.Thread(target=keep_leaving, args=(i,)) for i in range(NUM_LEAVERS)]
    threads += [threading.Thread(target=keep_drawing, args=(i,)) for i in range(num_bystanders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers), f"{answers.count(False)} of {len(answers)} failed, or were another's"
    return len(answers)
