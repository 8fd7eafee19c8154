"""Models with two tiers on a real cluster, and the trace in which requests are recorded."""

import math
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from flux_ray.simulator.traffic import from_zero, read_trace
from tests.cluster.conftest import PATIENCE_S, backlog, wait_until
from tests.cluster.storm import PROMPT, Generate, unread

LONG = {"size": "192x192", "steps": 30, "n": 4}


def model_for(address: str, deadline_s: float) -> str:
    """Return the tier that serves the model `auto` under this deadline."""
    answer = httpx.post(
        f"{address}/v1/images/generations",
        json={"model": "auto", "prompt": PROMPT},
        headers={"x-flux-deadline-s": f"{deadline_s}"},
        timeout=PATIENCE_S,
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


@pytest.mark.slow
def test_auto_is_the_best_tier_that_is_in_time(address: str, generate: Generate) -> None:
    for _ in range(3):
        began = time.monotonic()
        generate(PROMPT, model="tiny-tp2", **LONG)
        long_s = time.monotonic() - began
        began = time.monotonic()
        generate(PROMPT)
        deadline_s = max(1.0, 4 * (time.monotonic() - began))
    assert model_for(address, PATIENCE_S) == "tiny-tp2", "the later row of the catalogue"
    # Ten times the work that fits into the deadline: fast machines finish some of it meanwhile.
    load = {"model": "tiny-tp2", "prompt": PROMPT, **LONG}
    with ExitStack() as loads:
        for _ in range(1 + math.ceil(10 * deadline_s / long_s)):
            loads.enter_context(unread(address, load))
        wait_until(lambda: backlog("tiny-tp2")[0] > 2 * deadline_s, what="a busy tier")
        assert model_for(address, deadline_s) == "tiny", "the other has some seconds before it"


def test_a_cascade_shows_a_preview_of_the_same_request(
    client: openai.OpenAI, generate: Generate
) -> None:
    """The preview has the same seed, and comes while the better tier is busy with other work."""
    load = threading.Thread(target=generate, args=(PROMPT,), kwargs={"model": "tiny-tp2", **LONG})
    load.start()
    wait_until(lambda: sum(backlog("tiny-tp2")) > 0, what="a busy tier")
    with client.images.generate(
        model="studio", prompt=PROMPT, stream=True, extra_body={"seed": 7}
    ) as stream:
        events = list(stream)
    load.join()
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    early, late = events
    assert (early.model, late.model) == ("tiny", "tiny-tp2")
    assert early.id == late.id
    assert early.partial_image_index == 0
    assert late.usage.output_tokens > 0


def test_what_arrives_is_recorded(address: str, generate: Generate, traces: Path) -> None:
    def newest() -> tuple[str, int, int, int]:
        *_, last = read_trace(traces)
        return last.tier, last.width, last.height, last.steps

    generate(PROMPT, size="64x96", steps=3)
    wait_until(lambda: newest() == ("tiny", 64, 96, 3), what="the last request, recorded")
    assert next(from_zero(read_trace(traces))).at_s == 0
    assert PROMPT not in "".join(path.read_text() for path in traces.iterdir())
