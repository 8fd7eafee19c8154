"""Previews on the way to an image, through the whole cluster."""

import base64
import json
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import openai

from tests.cluster.conftest import PATIENCE_S, Replica
from tests.cluster.storm import PROMPT, Generate

LONG = {"model": "tiny", "prompt": "a ring", "size": "192x192", "steps": 50}
PREVIEWED = {"stream": True, "partial_images": 3}


def test_the_openai_client_sees_previews_and_then_the_same_image(
    client: openai.OpenAI, generate: Generate, pixels_of: Callable[[bytes], np.ndarray]
) -> None:
    with client.images.generate(
        model="tiny", prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 1}
    ) as stream:
        events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    *previews, final = [base64.b64decode(event.b64_json) for event in events]
    assert [final] == generate(PROMPT, seed=1)
    errors = [abs(pixels_of(each).astype(int) - pixels_of(final)).mean() for each in previews]
    assert errors[0] > errors[1] > 0


def test_an_edit_is_previewed_too(client: openai.OpenAI, generate: Generate) -> None:
    with client.images.edit(
        model="tiny-tp2",
        image=("ring.png", generate(PROMPT, seed=1)[0]),
        prompt="make the circle green",
        stream=True,
        partial_images=1,
    ) as stream:
        types = [event.type for event in stream]
    assert types == ["image_edit.partial_image", "image_edit.completed"]


def events_of(answer: httpx.Response) -> Iterator[dict]:
    """Yield the events of a stream as they come."""
    return (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))


def test_a_long_job_ends_when_its_client_has_seen_enough(
    address: str, generate: Generate, replicas: Callable[[str], list[Replica]]
) -> None:
    (replica,) = replicas("tiny")
    before_s = replica.busy_s()
    generate(**LONG)
    alone_s = replica.busy_s() - before_s
    url = f"{address}/v1/images/generations"
    with httpx.stream("POST", url, json=LONG | PREVIEWED | {"n": 4}, timeout=PATIENCE_S) as answer:
        assert next(events_of(answer))["partial_image_index"] == 0
    before_s = replica.busy_s()
    generate(PROMPT)
    worked_s = replica.busy_s() - before_s
    assert worked_s < 2 * alone_s, "nearly four times as long a job held the ranks"


def test_a_second_replica_goes_on_with_the_previews(
    address: str, generate: Generate, replicas: Callable[[str], list[Replica]]
) -> None:
    (image,) = generate(**LONG, seed=5)
    (replica,) = replicas("tiny")
    url = f"{address}/v1/images/generations"
    fields = LONG | PREVIEWED | {"seed": 5}
    with httpx.stream("POST", url, json=fields, timeout=PATIENCE_S) as answer:
        events = events_of(answer)
        assert next(events)["partial_image_index"] == 0
        replica.ranks[0].kill()
        *previews, final = list(events)
    assert [event["partial_image_index"] for event in previews] == [1, 2]
    assert base64.b64decode(final["b64_json"]) == image
