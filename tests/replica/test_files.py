"""Image files are made while the ranks go on: who waits for them, and who does not."""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from flux_ray.errors import FluxError
from flux_ray.replica import job as module
from flux_ray.replica.job import Files
from flux_ray.replica.step_loop import StepLoop
from flux_ray.replica.text_encoder import EncodedByRanks
from flux_ray.request import (
    Encoding,
    ImageRequest,
    Preview,
    RanksDone,
    RequestEvent,
    RgbImage,
    last_of,
)
from flux_ray.stages import DenoisedImage, Encoded, StageAnswer

REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 64, num_steps=2, guidance=1.0, seed=5)


class FakeRanks:
    """Notes stages; `decoded` are set by the last images of jobs."""

    def __init__(self) -> None:
        self.stages: list[tuple[int, str]] = []
        self.num_images: dict[int, int] = {}
        self.decoded: dict[int, asyncio.Event] = {}

    def longest_s(self, stage: str, sizes: tuple[int, ...]) -> float:
        return 1.0

    async def run(
        self, job: int, stages: tuple[str, ...], sizes: tuple[int, ...], *payload: object
    ) -> list[StageAnswer]:
        await asyncio.sleep(0)
        if payload:
            request, _ = payload
            assert isinstance(request, ImageRequest)
            self.num_images[job] = request.num_images
        (stage,) = stages
        self.stages.append((job, stage))
        number = len(self.stages)
        if self.stages.count((job, "decode")) == self.num_images[job]:
            self.event_of(job).set()
        if stage in ("preview", "decode"):
            return [StageAnswer(DenoisedImage(RgbImage(1, 1, b"%d %d" % (job, number)), job), 0.25)]
        return [StageAnswer(Encoded((), False) if stage == "encode" else None, 0.25)]

    def event_of(self, job: int) -> asyncio.Event:
        return self.decoded.setdefault(job, asyncio.Event())


class Encoder:
    """A file is the pixels; those of jobs that are `held` wait until they are let go."""

    def __init__(self, *held: int) -> None:
        self.gates = {job: threading.Event() for job in held}
        self.made: list[int] = []

    def encode(self, raster: RgbImage, encoding: Encoding) -> bytes:
        job = int(raster.rgb.split()[0])
        if job in self.gates:
            assert self.gates[job].wait(30)
        self.made.append(job)
        if encoding.quality == 1:
            raise OSError("encoder error -2")
        return raster.rgb

    def let_go(self) -> None:
        for gate in self.gates.values():
            gate.set()


class Client:
    """Listens."""

    def __init__(self) -> None:
        self.heard: list[RequestEvent] = []
        self.ranks_done = asyncio.Event()

    def hear(self, news: RequestEvent) -> None:
        self.heard.append(news)
        if isinstance(news, RanksDone):
            self.ranks_done.set()


@pytest.fixture
async def ranks() -> FakeRanks:
    return FakeRanks()


@pytest.fixture
async def encoder() -> AsyncIterator[Encoder]:
    encoder = Encoder(1)
    yield encoder
    encoder.let_go()


@pytest.fixture
async def loop(ranks: FakeRanks, encoder: Encoder) -> StepLoop:
    return StepLoop(ranks, EncodedByRanks(), lambda *seen: None, Files(encoder.encode))


async def test_the_next_request_is_generated_while_a_file_is_made(
    ranks: FakeRanks, loop: StepLoop, encoder: Encoder
) -> None:
    async with asyncio.timeout(10):
        first = asyncio.create_task(last_of(loop.stream(REQUEST)))
        await ranks.event_of(1).wait()
        second = await last_of(loop.stream(REQUEST))
        assert not first.done(), "its file is not made"
        assert (second.images[0].seed, encoder.made) == (2, [2])
        encoder.let_go()
        assert (await first).images[0].seed == 1
    jobs = [job for job, _ in ranks.stages]
    assert jobs == sorted(jobs), "and the ranks drew one after the other"


async def test_images_keep_their_order_whichever_file_is_made_first(
    loop: StepLoop, encoder: Encoder
) -> None:
    async with asyncio.timeout(10):
        pending = asyncio.create_task(last_of(loop.stream(replace(REQUEST, num_images=5))))
        await asyncio.sleep(0.01)
        encoder.let_go()
        result = await pending
    numbers = [int(image.data.split()[1]) for image in result.images]
    assert len(numbers) == 5 and numbers == sorted(numbers)


async def test_the_replica_is_free_before_the_file_is_made(
    loop: StepLoop, encoder: Encoder
) -> None:
    client = Client()
    async with asyncio.timeout(10):
        pending = asyncio.create_task(last_of(loop.stream(REQUEST), client.hear))
        await client.ranks_done.wait()
        assert not pending.done()
        encoder.let_go()
        result = await pending
    assert client.heard.count(RanksDone()) == 1
    assert result.times.decode_s == 0.25, "what its file took is no time of the ranks"
    assert result.times.file_s > 0


async def test_previews_are_heard_in_their_order_and_before_the_result(
    ranks: FakeRanks,
) -> None:
    """The first one's file takes the longest."""
    slow = threading.Event()

    def encode(raster: RgbImage, encoding: Encoding) -> bytes:
        if not heard and raster.rgb == first:
            slow.wait(0.2)
        return raster.rgb

    heard: list[RequestEvent] = []
    first = b"1 4"
    loop = StepLoop(ranks, EncodedByRanks(), lambda *seen: None, Files(encode))
    async with asyncio.timeout(10):
        await last_of(loop.stream(replace(REQUEST, num_steps=4, num_previews=3)), heard.append)
    previews = [news for news in heard if isinstance(news, Preview)]
    assert ranks.stages[3] == (1, "preview")
    assert [news.number for news in previews] == [0, 1, 2]
    numbers = [int(news.image.data.split()[1]) for news in previews]
    assert numbers == sorted(numbers)


async def test_who_leaves_while_a_file_is_made_is_gone_and_nobody_else(
    ranks: FakeRanks, loop: StepLoop, encoder: Encoder
) -> None:
    async with asyncio.timeout(10):
        client = Client()
        leaver = asyncio.create_task(last_of(loop.stream(REQUEST), client.hear))
        await client.ranks_done.wait()
        leaver.cancel()
        await asyncio.wait([leaver])
        assert (await last_of(loop.stream(REQUEST))).images[0].seed == 2
    assert (1, "drop") not in ranks.stages, "the last image has ended it on the ranks"


async def test_files_that_nobody_waits_for_are_not_begun(
    ranks: FakeRanks, loop: StepLoop, encoder: Encoder
) -> None:
    async with asyncio.timeout(10):
        client = Client()
        leaver = asyncio.create_task(
            last_of(loop.stream(replace(REQUEST, num_images=6)), client.hear)
        )
        await client.ranks_done.wait()
        leaver.cancel()
        await asyncio.wait([leaver])
        encoder.let_go()
        await last_of(loop.stream(REQUEST))
    assert encoder.made.count(1) <= module.NUM_THREADS


async def test_a_file_that_cannot_be_made_fails_its_request_only(
    loop: StepLoop, encoder: Encoder
) -> None:
    encoder.let_go()
    async with asyncio.timeout(10):
        with pytest.raises(FluxError, match="no file could be made of the image: encoder error"):
            await last_of(loop.stream(replace(REQUEST, encoding=Encoding("jpeg", quality=1))))
        assert (await last_of(loop.stream(REQUEST))).images
    assert not loop.pump.done()


async def test_the_ranks_wait_while_too_many_images_have_no_file(
    ranks: FakeRanks, loop: StepLoop, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(10):
        pending = asyncio.create_task(last_of(loop.stream(replace(REQUEST, num_images=20))))
        for _ in range(500):
            await asyncio.sleep(0)
        num_decoded = ranks.stages.count((1, "decode"))
        assert module.MAX_WAITING <= num_decoded < 20
        encoder.let_go()
        assert len((await pending).images) == 20


async def test_a_mistake_while_it_is_answered_is_told(ranks: FakeRanks) -> None:
    def observe(stage: str, seconds: float) -> None:
        if stage == "file":
            raise KeyError("a bug")

    loop = StepLoop(ranks, EncodedByRanks(), observe, Files(Encoder().encode))
    with pytest.raises(KeyError, match="a bug"):
        await asyncio.wait_for(last_of(loop.stream(REQUEST)), 10)
