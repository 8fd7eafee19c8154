"""What a replica has of requests that come again: its client's images, or nothing."""

import asyncio

import pytest

from flux_ray.errors import NotKept, OutOfMemory
from flux_ray.replica.leader import RunningRequests
from flux_ray.request import (
    Finished,
    GeneratedImage,
    ImageResult,
    OnEvent,
    Progress,
    RequestEvent,
    StageTimes,
)

KEEP_S = 60.0


class Painter:
    """Draws when it is told to, and counts."""

    def __init__(self, num_bytes: int = 10) -> None:
        self.may_end = asyncio.Event()
        self.num_begun = self.num_left = 0
        self.hears: list[OnEvent] = []
        self.error: Exception | None = None
        image = GeneratedImage(bytes(num_bytes), 7)
        self.result = ImageResult("id", "tiny", (image,), StageTimes(0, 0, 0, 0))

    async def generate(self, hear: OnEvent) -> ImageResult:
        self.num_begun += 1
        self.hears.append(hear)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        if self.error is not None:
            raise self.error
        return self.result


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
    first = await begun(runs.generate("a", painter.generate, None))
    again = await begun(runs.recall("a", heard.append))
    painter.hears[0](Progress(1, 4))
    painter.may_end.set()
    assert await again is await first is painter.result
    assert heard == [Progress(1, 4)]
    assert await runs.recall("a", None) is painter.result
    assert painter.num_begun == 1


async def test_images_that_were_done_before_are_heard_of_again(
    runs: RunningRequests, painter: Painter
) -> None:
    heard: list[RequestEvent] = []
    done = Finished("tiny", GeneratedImage(b"first", 7), 0)
    first = await begun(runs.generate("a", painter.generate, None))
    painter.hears[0](Progress(1, 4))
    painter.hears[0](done)
    again = await begun(runs.recall("a", heard.append))
    assert heard == [done]
    painter.may_end.set()
    await asyncio.gather(first, again)


async def test_the_last_who_leaves_ends_it(runs: RunningRequests, painter: Painter) -> None:
    first = await begun(runs.generate("a", painter.generate, None))
    again = await begun(runs.recall("a", None))
    await leave(first)
    assert painter.num_left == 0
    again.cancel()
    with pytest.raises(asyncio.CancelledError):
        await again
    with pytest.raises(NotKept):
        await runs.recall("a", None)
    await asyncio.sleep(0)
    assert painter.num_left == 1


async def test_a_failure_is_told_to_all_and_not_kept(
    runs: RunningRequests, painter: Painter
) -> None:
    painter.error = OutOfMemory("too large")
    first = await begun(runs.generate("a", painter.generate, None))
    again = await begun(runs.recall("a", None))
    painter.may_end.set()
    for task in (first, again):
        with pytest.raises(OutOfMemory):
            await task
    with pytest.raises(NotKept):
        await runs.recall("a", None)


async def test_another_name_has_nothing(runs: RunningRequests, painter: Painter) -> None:
    painter.may_end.set()
    await runs.generate("a", painter.generate, None)
    with pytest.raises(NotKept):
        await runs.recall("b", None)


async def test_what_is_generated_anew_replaces_what_was_kept(runs: RunningRequests) -> None:
    old, new = Painter(), Painter()
    old.may_end.set()
    await runs.generate("a", old.generate, None)
    generation = await begun(runs.generate("a", new.generate, None))
    again = await begun(runs.recall("a", None))
    new.may_end.set()
    assert await again is await generation is new.result


async def test_results_are_kept_for_a_while(
    runs: RunningRequests, clock: Clock, painter: Painter
) -> None:
    painter.may_end.set()
    await runs.generate("a", painter.generate, None)
    clock.now = KEEP_S - 1
    await runs.recall("a", None)
    clock.now = KEEP_S
    with pytest.raises(NotKept):
        await runs.recall("a", None)


async def test_an_idle_replica_forgets_them_too() -> None:
    runs, painter = RunningRequests(100, 0.01), Painter()
    painter.may_end.set()
    await runs.generate("a", painter.generate, None)
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
        painter.may_end.set()
        await runs.generate(name, painter.generate, None)
        await asyncio.sleep(0)
    assert "".join(runs._kept) == kept
    assert runs._num_bytes <= 100
