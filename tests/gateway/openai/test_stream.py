"""Streams begin at once, are never silent, and send each image when it is done, once."""

import asyncio
import base64
import json
from typing import Any

import pytest

from flux_ray.errors import BadRequest, Overloaded, ReplicaFailed
from flux_ray.gateway import http as event_stream
from flux_ray.gateway.errors import Envelope, Failure
from flux_ray.gateway.http import event_text, kept_alive
from flux_ray.request import (
    Finished,
    GeneratedImage,
    ImageRequest,
    ImageResult,
    OnEvent,
    Progress,
    QueuePosition,
    RequestEvent,
    StageTimes,
)
from tests.gateway.streaming import event_of, streamed

PATH = "/v1/images/generations"
BODY: dict[str, Any] = {"prompt": "a ring", "stream": True, "seed": 5}


def test_no_text_ends_an_event():
    """Python's clients end lines also at these, as httpx does."""
    text = "a\n\nb\r\x0b\x0c\x1c\x85\u2028\u2029 data: c"
    failure = Failure(message=text, type="server_error", code="server_error")
    lines = event_text("error", Envelope(error=failure)).splitlines()
    assert lines[0] == "event: error"
    assert json.loads(lines[1].removeprefix("data: "))["error"]["message"] == text
    assert lines[2:] == [""]


def image(seed: int) -> GeneratedImage:
    return GeneratedImage(b"image %d" % seed, seed)


def finished(index: int) -> Finished:
    return Finished("tiny", image(5 + index), index)


class Replica:
    """Lets hear what it is told to, and then answers or fails: `script` holds the attempts."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[RequestEvent | Exception | None] = asyncio.Queue()
        self.was_left = False

    async def __call__(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None = None
    ) -> ImageResult:
        try:
            while (step := await self.steps.get()) is not None:
                if isinstance(step, Exception):
                    raise step
                assert on_event is not None
                on_event(step)
        except asyncio.CancelledError:
            self.was_left = True
            raise
        images = tuple(image(seed) for seed in request.seeds)
        times = StageTimes(0, 0, 0, 0)
        return ImageResult(request.request_id, request.tier, images, times, ("the last word",))

    def tell(self, *steps: RequestEvent | Exception | None) -> None:
        for step in steps:
            self.steps.put_nowait(step)


@pytest.fixture
async def replica(handles, monkeypatch) -> Replica:
    replica = Replica()
    monkeypatch.setattr(handles, "generate", replica)
    return replica


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats at once, so that a test need not wait for them."""
    monkeypatch.setattr(event_stream, "HOLD_S", 0.001)
    monkeypatch.setattr(event_stream, "HEARTBEAT_S", 0.001)


async def test_headers_come_before_the_image(api, replica, quick):
    async with streamed(api, PATH, BODY) as answer:
        await answer.head()
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-store, no-transform"
        assert answer.headers["x-flux-seed"] == "5"
        assert await answer.block() == ": waiting"
        replica.tell(None)
        name, data = event_of(next(each for each in await answer.blocks() if each[0] != ":"))
    assert (name, data["seed"]) == ("image_generation.completed", 5)


async def test_comments_say_where_the_request_stands(api, replica, quick):
    async with streamed(api, PATH, BODY) as answer:
        await answer.head()
        for news, comment in (
            (QueuePosition(3, 12.34), ": queued position=3 expected_s=12.3"),
            (QueuePosition(0, None), ": queued position=0"),
            (Progress(1, 4), ": generating progress=0.25"),
        ):
            replica.tell(news)
            # Some that say what was before may be on their way.
            while await answer.block() != comment:
                pass
        replica.tell(None)
        await answer.blocks()


async def test_each_image_is_sent_when_it_is_done(api, replica):
    async with streamed(api, PATH, BODY | {"n": 3}) as answer:
        seeds = []
        for index in range(2):
            replica.tell(finished(index))
            if not index:
                await answer.head()
            name, data = event_of(await answer.block())
            assert name == "image_generation.completed"
            assert base64.b64decode(data["b64_json"]) == b"image %d" % data["seed"]
            assert data["warnings"] == []
            seeds.append(data["seed"])
        replica.tell(None)
        [last] = [event_of(block)[1] for block in await answer.blocks()]
    assert [*seeds, last["seed"]] == [5, 6, 7]
    assert last["warnings"] == ["the last word"]
    assert last["usage"]["output_tokens"] == 3 * 64


async def test_no_image_is_sent_twice_where_a_second_replica_begins_anew(api, replica):
    replica.tell(finished(0), ReplicaFailed("died"), finished(0), finished(1), None)
    async with streamed(api, PATH, BODY | {"n": 3}) as answer:
        await answer.head()
        events = [event_of(block) for block in await answer.blocks()]
    assert [(name, data["seed"]) for name, data in events] == [
        ("image_generation.completed", seed) for seed in (5, 6, 7)
    ]


async def test_an_error_after_the_headers_is_an_event(api, turns, replica, quick):
    async with streamed(api, PATH, BODY) as answer:
        await answer.head()
        turns.refusals = [Overloaded("too late", None, 7)]
        replica.tell(ReplicaFailed("died"))
        blocks = [block for block in await answer.blocks() if not block.startswith(":")]
    [(name, data)] = map(event_of, blocks)
    assert (answer.status, name) == (200, "error")
    assert (data["error"]["code"], data["retry_after_s"]) == ("overloaded", 7)


@pytest.mark.parametrize(
    ("error", "status"), [(Overloaded("too late", None, 7), 429), (BadRequest("no"), 400)]
)
async def test_what_is_refused_at_once_keeps_its_status(api, replica, error, status):
    replica.tell(error)
    async with streamed(api, PATH, BODY) as answer:
        await answer.head()
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"


async def test_who_leaves_while_nothing_is_sent_ends_the_generation(api, replica, quick):
    async with streamed(api, PATH, BODY) as answer:
        await answer.head()
        await answer.block()
    assert replica.was_left


async def test_edits_are_streamed_under_their_own_name(api, replica, make_image):
    source = base64.b64encode(make_image()).decode()
    replica.tell(None)
    async with streamed(api, "/v1/images/edits", BODY | {"image": source}) as answer:
        await answer.head()
        [(name, _)] = map(event_of, await answer.blocks())
    assert name == "image_edit.completed"


async def test_silence_is_filled_for_as_long_as_it_lasts(quick):
    async def texts():
        await asyncio.Event().wait()
        yield ""

    kept = kept_alive(texts(), lambda: "still here")
    assert [await anext(kept) for _ in range(3)] == [": still here\n\n"] * 3
    await kept.aclose()


def test_a_heartbeat_is_faster_than_the_shortest_idle_time_of_proxies():
    """Load balancers cut after 60 s by default, some after 10."""
    assert event_stream.HEARTBEAT_S <= 5
    assert event_stream.HOLD_S <= 0.5
