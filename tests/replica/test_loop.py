"""The step loop over ranks that only take notes: who is drawn, dropped, skipped, failed."""

import asyncio
from dataclasses import replace

import pytest

from flux_ray.errors import BadReference, ReplicaFailed
from flux_ray.replica.loop import StepLoop
from flux_ray.replica.prompts import EncodedByRanks
from flux_ray.request import (
    Encoded,
    GeneratedImage,
    ImageRequest,
    ImageResult,
    News,
    Preview,
    Progress,
    Raster,
)

REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 64, num_steps=3, guidance=1.0, seed=5)


class FakeRanks:
    """Notes every call; `gate` holds the steps, `errors` are raised by the method of that name."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []
        self.sizes: set[tuple[int, ...]] = set()
        self.encoded: list[object] = []
        self.seeds: dict[int, int] = {}
        self.errors: dict[str, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.stepping = asyncio.Event()
        self.turn = asyncio.Lock()

    async def call(self, method: str, sizes: tuple[int, ...], *args: object) -> object:
        job, *rest = args
        assert isinstance(job, int)
        self.sizes.add(sizes)
        self.calls.append((job, method))
        async with self.turn:
            return await self.answer(method, job, rest)

    async def answer(self, method: str, job: int, rest: list[object]) -> object:
        if method in self.errors:
            raise self.errors[method]
        if method == "prepare":
            (self.seeds[job],) = rest  # type: ignore[assignment]
        if method == "denoise":
            self.stepping.set()
            await self.gate.wait()
        if method == "encode":
            self.encoded.append(rest[1])
            return Encoded(("cut",), is_cached=True)
        if method in ("decode", "preview"):
            return GeneratedImage(method.encode(), self.seeds[job])
        return None

    def methods(self, job: int) -> list[str]:
        return [method for number, method in self.calls if number == job]


@pytest.fixture
async def ranks() -> FakeRanks:
    return FakeRanks()


class FakeEncoder:
    """A shared text encoder that answers, or raises, what it is told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    async def wait_until_loaded(self) -> None: ...

    async def encode_prompt(self, prompt: str) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return (prompt, self.answer)


@pytest.fixture
async def loop(ranks: FakeRanks) -> StepLoop:
    return StepLoop(ranks, EncodedByRanks(), observe=lambda stage, seconds: None)


async def after_the_answer() -> None:
    """The client has it before the ranks forget the job."""
    await asyncio.sleep(0)


async def test_one_request_goes_through_its_stages(ranks: FakeRanks, loop: StepLoop) -> None:
    result = await loop.generate(REQUEST)
    assert result.request_id == "a"
    assert [image.seed for image in result.images] == [5]
    assert result.warnings == ("cut",)
    assert result.times.is_cached
    stages = ["encode", "prepare", "denoise", "denoise", "denoise", "decode", "drop"]
    await after_the_answer()
    assert ranks.methods(1) == stages


async def test_n_images_are_encoded_once(ranks: FakeRanks, loop: StepLoop) -> None:
    result = await loop.generate(replace(REQUEST, num_images=2))
    assert [image.seed for image in result.images] == [5, 6]
    image = ["prepare", "denoise", "denoise", "denoise", "decode"]
    await after_the_answer()
    assert ranks.methods(1) == ["encode", *image, *image, "drop"]


async def test_times_are_told(ranks: FakeRanks) -> None:
    told: list[str] = []
    loop = StepLoop(ranks, EncodedByRanks(), observe=lambda stage, seconds: told.append(stage))
    times = (await loop.generate(REQUEST)).times
    assert min(times.queue_s, times.encode_s, times.denoise_s, times.decode_s) > 0
    assert told == ["prompt", "encode", "prepare", "denoise", "denoise", "denoise", "decode"]


async def test_a_client_that_leaves_is_dropped_at_the_step_boundary(
    ranks: FakeRanks, loop: StepLoop
) -> None:
    ranks.gate.clear()
    leaver = asyncio.create_task(loop.generate(REQUEST))
    bystander = asyncio.create_task(loop.generate(REQUEST))
    await ranks.stepping.wait()

    leaver.cancel()
    await asyncio.wait([leaver])
    assert ranks.methods(1)[-1] == "denoise", "the step that runs is not interrupted"
    ranks.gate.set()

    assert (await bystander).images
    known = ["encode", "prepare", "denoise", "denoise"]
    assert ranks.methods(1) == [*known, "drop"], "nor the one that was sent ahead"


async def test_a_client_that_left_before_its_turn_is_skipped(
    ranks: FakeRanks, loop: StepLoop
) -> None:
    ranks.gate.clear()
    first = asyncio.create_task(loop.generate(REQUEST))
    leaver = asyncio.create_task(loop.generate(REQUEST))
    await ranks.stepping.wait()
    leaver.cancel()
    await asyncio.wait([leaver])
    ranks.gate.set()

    await first
    assert (await loop.generate(REQUEST)).images
    assert ranks.methods(2) == []


async def test_a_callers_mistake_fails_its_own_request_only(
    ranks: FakeRanks, loop: StepLoop
) -> None:
    ranks.errors["encode"] = BadReference("too small", "image")
    with pytest.raises(BadReference, match="too small"):
        await loop.generate(REQUEST)
    ranks.errors.clear()
    assert (await loop.generate(REQUEST)).images
    assert ranks.methods(1) == ["encode", "prepare", "drop"]


async def test_previews_come_between_the_steps(ranks: FakeRanks, loop: StepLoop) -> None:
    heard: list[News] = []
    request = replace(REQUEST, num_previews=2, num_images=2)
    result = await loop.generate(request, heard.append)
    assert result.images == (await loop.generate(replace(REQUEST, num_images=2))).images
    image = ["prepare", "denoise", "preview", "denoise", "preview", "denoise", "decode"]
    assert ranks.methods(1) == ["encode", *image, *image, "drop"]
    assert heard == [
        Progress(1, 6),
        Preview("tiny", GeneratedImage(b"preview", 5), 0),
        Progress(2, 6),
        Preview("tiny", GeneratedImage(b"preview", 5), 1),
        Progress(3, 6),
        Progress(4, 6),
        Preview("tiny", GeneratedImage(b"preview", 6), 2),
        Progress(5, 6),
        Preview("tiny", GeneratedImage(b"preview", 6), 3),
        Progress(6, 6),
    ]


async def test_previews_are_times_of_decoding(ranks: FakeRanks) -> None:
    told: list[tuple[str, float]] = []
    loop = StepLoop(ranks, EncodedByRanks(), observe=lambda *stage: told.append(stage))
    times = (await loop.generate(replace(REQUEST, num_previews=1))).times
    decoding = [seconds for stage, seconds in told if stage in ("preview", "decode")]
    assert len(decoding) == 2
    assert times.decode_s == pytest.approx(sum(decoding))


async def test_who_has_left_hears_nothing_more(ranks: FakeRanks, loop: StepLoop) -> None:
    heard: list[News] = []
    ranks.gate.clear()
    leaver = asyncio.create_task(loop.generate(replace(REQUEST, num_previews=3), heard.append))
    await ranks.stepping.wait()
    leaver.cancel()
    await asyncio.wait([leaver])
    ranks.gate.set()
    await loop.generate(REQUEST)
    assert heard == []


async def test_one_call_is_sent_ahead(ranks: FakeRanks, loop: StepLoop) -> None:
    ranks.gate.clear()
    request = asyncio.create_task(loop.generate(REQUEST))
    await ranks.stepping.wait()
    assert ranks.methods(1) == ["encode", "prepare", "denoise", "denoise"]
    ranks.gate.set()
    await request


async def test_a_call_that_was_sent_ahead_is_timed_from_the_end_of_the_former(
    ranks: FakeRanks,
) -> None:
    told: list[tuple[str, float]] = []
    loop = StepLoop(ranks, EncodedByRanks(), observe=lambda *stage: told.append(stage))
    ranks.gate.clear()
    asyncio.get_running_loop().call_later(0.1, ranks.gate.set)
    times = (await loop.generate(REQUEST)).times
    first, *others = [seconds for stage, seconds in told if stage == "denoise"]
    assert first > 0.09 > 0.05 > max(others)
    assert times.denoise_s == pytest.approx(first + sum(others))


async def test_the_next_job_begins_while_the_former_is_dropped(
    ranks: FakeRanks, loop: StepLoop
) -> None:
    ranks.gate.clear()
    jobs = [asyncio.create_task(loop.generate(replace(REQUEST, num_steps=1))) for _ in range(2)]
    await ranks.stepping.wait()
    ranks.gate.set()
    await jobs[0]
    await jobs[1]
    assert ranks.calls.index((2, "encode")) == ranks.calls.index((1, "drop")) + 1
    assert ranks.methods(2)[-1] == "drop"


async def test_a_broken_group_fails_what_waits_too(ranks: FakeRanks, loop: StepLoop) -> None:
    broken = ReplicaFailed("a rank died")
    ranks.errors = dict.fromkeys(("encode", "drop"), broken)
    answers = await asyncio.gather(
        loop.generate(REQUEST), loop.generate(REQUEST), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [ReplicaFailed, ReplicaFailed]


async def test_a_mistake_of_ours_ends_the_loop(ranks: FakeRanks, loop: StepLoop) -> None:
    ranks.errors["prepare"] = KeyError("a bug")
    stuck = asyncio.create_task(loop.generate(REQUEST))
    await asyncio.wait([loop.pump])
    assert isinstance(loop.pump.exception(), KeyError)
    with pytest.raises(ReplicaFailed):
        await loop.generate(REQUEST)
    stuck.cancel()


async def test_requests_are_drawn_in_order_of_arrival(ranks: FakeRanks, loop: StepLoop) -> None:
    results: list[ImageResult] = await asyncio.gather(
        *(loop.generate(replace(REQUEST, seed=seed)) for seed in range(5))
    )
    assert [result.images[0].seed for result in results] == list(range(5))
    jobs = [job for job, _ in ranks.calls]
    assert jobs == sorted(jobs)


async def test_ranks_are_told_how_much_work_a_call_is(ranks: FakeRanks, loop: StepLoop) -> None:
    references = (Raster(8, 4, b""), Raster(2, 2, b""))
    await loop.generate(replace(REQUEST, references=references))
    assert ranks.sizes == {(64 * 64, 8 * 4 + 2 * 2)}


async def test_a_prompt_that_is_encoded_elsewhere_goes_to_the_ranks(ranks: FakeRanks) -> None:
    loop = StepLoop(ranks, FakeEncoder("embeds"), observe=lambda stage, seconds: None)
    await loop.generate(REQUEST)
    assert ranks.encoded == [(REQUEST.prompt, "embeds")]


async def test_a_text_encoder_that_fails_costs_one_request(ranks: FakeRanks) -> None:
    encoder = FakeEncoder(ReplicaFailed("the text encoder died"))
    loop = StepLoop(ranks, encoder, observe=lambda stage, seconds: None)
    with pytest.raises(ReplicaFailed, match="text encoder"):
        await loop.generate(REQUEST)
    assert ranks.calls == [], "the ranks never heard of it"
    encoder.answer = "embeds"
    assert (await loop.generate(REQUEST)).images
