"""Clients that leave in mid-request, beside clients that wait for their images."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

PROMPT = "a red circle on a blue background"
NUM_LEAVERS = 8
Generate = Callable[..., list[bytes]]


@contextmanager
def unread(address: str, fields: dict[str, object]) -> Iterator[None]:
    """Send a request; leaving the `with` closes the connection without reading the answer."""
    place = urlsplit(address)
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(head.encode() + body)
        yield


def storm(
    address: str, seconds: float, generate: Generate, *, tier: str, num_bystanders: int
) -> int:
    """Let clients leave in mid-request while bystanders ask; return the bystanders' images.

    Raise AssertionError if an image is not that of its seed. Every bystander gets at least three,
    so on a slow machine the storm lasts longer than `seconds`.
    """
    expected = [generate(PROMPT, model=tier, seed=seed) for seed in range(num_bystanders)]
    end = time.monotonic() + seconds
    answers: list[bool] = []
    bystanders: list[threading.Thread] = []

    def keep_leaving(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < end or any(bystander.is_alive() for bystander in bystanders):
            fields = {"model": tier, "prompt": "a ring", "steps": dice.choice([1, 4, 20])}
            streamed = dice.choice([{}, {"stream": True, "partial_images": 2}])
            with unread(address, fields | streamed):
                time.sleep(dice.uniform(0, 0.4))

    def keep_generating(seed: int) -> None:
        num_generated = 0
        while time.monotonic() < end or num_generated < 3:
            num_generated += 1
            try:
                answers.append(generate(PROMPT, model=tier, seed=seed) == expected[seed])
            except AssertionError:
                answers.append(False)
                raise

    bystanders += [
        threading.Thread(target=keep_generating, args=(i,)) for i in range(num_bystanders)
    ]
    leavers = [threading.Thread(target=keep_leaving, args=(i,)) for i in range(NUM_LEAVERS)]
    threads = bystanders + leavers
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers), f"{answers.count(False)} of {len(answers)} failed, or were another's"
    return len(answers)
