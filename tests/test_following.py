"""Events and a result as one stream, however it ends."""

import asyncio
from contextlib import aclosing

import pytest

from flux_ray.errors import ReplicaFailed
from flux_ray.request import ImageResult, OnEvent, Progress, StageTimes, stream_events

RESULT = ImageResult("id", "tiny", (), StageTimes(0, 0, 0, 0))
STEPS = [Progress(1, 2), Progress(2, 2)]


async def test_the_result_comes_last() -> None:
    async def generate(on_event: OnEvent) -> ImageResult:
        for step in STEPS:
            on_event(step)
            await asyncio.sleep(0)
        return RESULT

    assert [value async for value in stream_events(generate)] == [*STEPS, RESULT]


async def test_an_error_comes_after_what_was_heard() -> None:
    async def generate(on_event: OnEvent) -> ImageResult:
        on_event(STEPS[0])
        raise ReplicaFailed("died")

    heard = []
    with pytest.raises(ReplicaFailed, match="died"):
        async for value in stream_events(generate):
            heard.append(value)
    assert heard == STEPS[:1]


async def test_who_leaves_ends_it() -> None:
    ended = asyncio.Event()

    async def generate(on_event: OnEvent) -> ImageResult:
        on_event(STEPS[0])
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return RESULT

    async with aclosing(stream_events(generate)) as stream:
        await anext(stream)
        assert not ended.is_set()
    assert ended.is_set()

    async def listen() -> None:
        async for _ in stream_events(generate):
            ended.clear()

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0.01)
    assert not ended.is_set()
    listener.cancel()
    await asyncio.wait({listener})
    assert ended.is_set()
