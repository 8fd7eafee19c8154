"""What a replica has of requests that come again: its client's images, or nothing."""

import asyncio

import pytest

from flux_ray.errors import NotKept, OutOfMemory
from flux_ray.replica.leader import RunningRequests
from flux_ray.request import (
    EventStream,
    Finished,
    GeneratedImage,
    ImageResult,
    Progress,
    RequestEvent,
    StageTimes,
    last_of,
)

KEEP_S = 60.0


class Painter:
    """Draws when it is told to, and counts."""

    def __init__(self, num_bytes: int = 10) -> None:
        self.events: asyncio.Queue[RequestEvent | None] = asyncio.Queue()
        self.num_begun = self.num_left = 0
        self.error: Exception | None = None
        image = GeneratedImage(bytes(num_bytes), 7)
        self.result = ImageResult("id", "tiny", (image,), StageTimes(0, 0, 0, 0))

    def tell(self, event: RequestEvent) -> None:
        self.events.put_nowait(event)

    def end(self) -> None:
        self.events.put_nowait(None)

    async def stream(self) -> EventStream:
        self.num_begun += 1
        try:
            while (event := await self.events.get()) is not None:
                yield event
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        if self.error is not None:
            raise self.error
        yield self.result


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runs(clock: Clock) -> RunningRequests:
    return RunningRequests(100, KEEP_S, clock)


@pytest.fixture
async def painter() -> Painter:
    return Painter()


async def begun(coroutine: object) -> "asyncio.Task[ImageResult]":
    task = asyncio.ensure_future(coroutine)  # type: ignore[arg-type]
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def leave(task: "asyncio.Task[ImageResult]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)


async def test_who_asks_again_gets_the_run_that_goes_on(
    runs: RunningRequests, painter: Painter
) -> None:
    """Its first caller's gateway is dead, and so nobody cancels."""
    heard: list[RequestEvent] = []
    first = await begun(last_of(runs.stream("a", painter.stream())))
    again = await begun(last_of(runs.recall("a"), heard.append))
    painter.tell(Progress(1, 4))
    painter.end()
    assert await again is await first is painter.result
    assert heard == [Progress(1, 4)]
    assert await last_of(runs.recall("a")) is painter.result
    assert painter.num_begun == 1


async def test_images_that_were_done_before_are_heard_of_again(
    runs: RunningRequests, painter: Painter
) -> None:
    heard: list[RequestEvent] = []
    done = Finished("tiny", GeneratedImage(b"first", 7), 0)
    first = await begun(last_of(runs.stream("a", painter.stream())))
    painter.tell(Progress(1, 4))
    painter.tell(done)
    again = await begun(last_of(runs.recall("a"), heard.append))
    assert heard == [done]
    painter.end()
    await asyncio.gather(first, again)


async def test_the_last_who_leaves_ends_it(runs: RunningRequests, painter: Painter) -> None:
    first = await begun(last_of(runs.stream("a", painter.stream())))
    again = await begun(last_of(runs.recall("a")))
    await leave(first)
    assert painter.num_left == 0
    again.cancel()
    with pytest.raises(asyncio.CancelledError):
        await again
    with pytest.raises(NotKept):
        await last_of(runs.recall("a"))
    await asyncio.sleep(0)
    assert painter.num_left == 1


async def test_a_failure_is_told_to_all_and_not_kept(
    runs: RunningRequests, painter: Painter
) -> None:
    painter.error = OutOfMemory("too large")
    first = await begun(last_of(runs.stream("a", painter.stream())))
    again = await begun(last_of(runs.recall("a")))
    painter.end()
    for task in (first, again):
        with pytest.raises(OutOfMemory):
            await task
    with pytest.raises(NotKept):
        await last_of(runs.recall("a"))


async def test_another_name_has_nothing(runs: RunningRequests, painter: Painter) -> None:
    painter.end()
    await last_of(runs.stream("a", painter.stream()))
    with pytest.raises(NotKept):
        await last_of(runs.recall("b"))


async def test_what_is_generated_anew_replaces_what_was_kept(runs: RunningRequests) -> None:
    old, new = Painter(), Painter()
    old.end()
    await last_of(runs.stream("a", old.stream()))
    generation = await begun(last_of(runs.stream("a", new.stream())))
    again = await begun(last_of(runs.recall("a")))
    new.end()
    assert await again is await generation is new.result


async def test_results_are_kept_for_a_while(
    runs: RunningRequests, clock: Clock, painter: Painter
) -> None:
    painter.end()
    await last_of(runs.stream("a", painter.stream()))
    clock.now = KEEP_S - 1
    await last_of(runs.recall("a"))
    clock.now = KEEP_S
    with pytest.raises(NotKept):
        await last_of(runs.recall("a"))


async def test_an_idle_replica_forgets_them_too() -> None:
    runs, painter = RunningRequests(100, 0.01), Painter()
    painter.end()
    await last_of(runs.stream("a", painter.stream()))
    async with asyncio.timeout(30):
        while runs._kept:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("sizes", "kept"), [([40, 40, 40], "bc"), ([40, 101], ""), ([101, 40], "b"), ([0, 100], "ab")]
)
async def test_their_bytes_are_bounded(runs: RunningRequests, sizes: list[int], kept: str) -> None:
    """The oldest give way."""
    for name, size in zip("abc", sizes, strict=False):
        painter = Painter(size)
        painter.end()
        await last_of(runs.stream(name, painter.stream()))
        await asyncio.sleep(0)
    assert "".join(runs._kept) == kept
    assert runs._num_bytes <= 100
