"""The step loop over ranks that only take notes: who is drawn, dropped, skipped, failed."""

import asyncio
import math
from collections import defaultdict
from dataclasses import replace

import pytest

from flux_ray.errors import BadReference, ReplicaFailed
from flux_ray.replica.job import Files
from flux_ray.replica.step_loop import SHORT_S, StepLoop
from flux_ray.replica.text_encoder import EncodedByRanks
from flux_ray.request import (
    Finished,
    GeneratedImage,
    ImageRequest,
    ImageResult,
    Mask,
    Preview,
    Progress,
    RanksDone,
    RequestEvent,
    RgbImage,
    last_of,
)
from flux_ray.stages import DenoisedImage, Encoded, StageAnswer

REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 64, num_steps=3, guidance=1.0, seed=5)


class FakeRanks:
    """Notes every stage; `gate` holds the steps, `errors` are raised by the stage of that name.

    A stage takes `stage_s`, as far as the ranks say so, and `expected_s`, as far as they foresee.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []
        self.num_calls = 0
        self.stage_s = 0.25
        self.expected_s = math.inf
        self.sizes: set[tuple[int, ...]] = set()
        self.encoded: list[object] = []
        self.seeds: dict[int, list[int]] = {}
        self.errors: dict[str, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.stepping = asyncio.Event()
        self.turn = asyncio.Lock()

    def longest_s(self, stage: str, sizes: tuple[int, ...]) -> float:
        return self.expected_s

    async def run(
        self, job: int, stages: tuple[str, ...], sizes: tuple[int, ...], *payload: object
    ) -> list[StageAnswer]:
        self.num_calls += 1
        self.sizes.add(sizes)
        self.calls += [(job, stage) for stage in stages]
        if payload:
            request, encoded = payload
            assert isinstance(request, ImageRequest)
            self.seeds[job] = [0, *request.seeds]
            self.encoded.append(encoded)
        async with self.turn:
            return [StageAnswer(await self.answer(job, stage), self.stage_s) for stage in stages]

    async def answer(self, job: int, stage: str) -> object:
        if stage in self.errors:
            raise self.errors[stage]
        if stage == "prepare":
            del self.seeds[job][0]
        if stage == "denoise":
            self.stepping.set()
            await self.gate.wait()
        if stage == "encode":
            return Encoded(("cut",), is_cached=True)
        if stage in ("decode", "preview"):
            return DenoisedImage(RgbImage(1, 1, stage.encode()), self.seeds[job][0])
        return None

    def stages(self, job: int) -> list[str]:
        return [stage for number, stage in self.calls if number == job]


@pytest.fixture
async def ranks() -> FakeRanks:
    return FakeRanks()


class FakeEncoder:
    """A shared text encoder that answers, or raises, what it is told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    async def wait_until_loaded(self) -> None: ...

    async def encode_prompts(self, prompts: tuple[str, ...]) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return (*prompts, self.answer)


class SlowEncoder(FakeEncoder):
    """Takes its time; `encoded` tells of each prompt."""

    seconds = 0.02

    def __init__(self) -> None:
        super().__init__("embeds")
        self.encoded: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def encode_prompts(self, prompts: tuple[str, ...]) -> object:
        await asyncio.sleep(self.seconds)
        self.encoded[prompts[0]].set()
        return await super().encode_prompts(prompts)


def files() -> Files:
    """Which are the very pixels."""
    return Files(lambda raster, encoding: raster.rgb)


@pytest.fixture
async def loop(ranks: FakeRanks) -> StepLoop:
    return StepLoop(ranks, EncodedByRanks(), lambda stage, seconds: None, files())


async def test_one_request_goes_through_its_stages(ranks: FakeRanks, loop: StepLoop) -> None:
    result = await last_of(loop.stream(REQUEST))
    assert result.request_id == "a"
    assert [image.seed for image in result.images] == [5]
    assert result.warnings == ("cut",)
    assert result.times.is_cached
    stages = ["encode", "prepare", "denoise", "denoise", "denoise", "decode"]
    assert (ranks.stages(1), ranks.num_calls) == (stages, len(stages))


async def test_steps_that_strength_leaves_out_are_not_asked_for(
    ranks: FakeRanks, loop: StepLoop
) -> None:
    image, mask = RgbImage(64, 64, bytes(64 * 64 * 3)), Mask(64, 64, bytes(64 * 64))
    edit = replace(REQUEST, references=(image,), mask=mask, strength=0.5)
    heard: list[RequestEvent] = []
    await last_of(loop.stream(edit), heard.append)
    assert ranks.stages(1) == ["encode", "prepare", "denoise", "denoise", "decode"]
    assert heard == [Progress(1, 2), Progress(2, 2), RanksDone()]


async def test_short_stages_go_together(ranks: FakeRanks, loop: StepLoop) -> None:
    alone = await last_of(loop.stream(REQUEST))
    stages, ranks.num_calls = ranks.stages(1), 0
    ranks.expected_s = SHORT_S / 2.5
    heard: list[RequestEvent] = []
    together = await last_of(loop.stream(REQUEST), heard.append)
    assert (ranks.stages(2), ranks.num_calls) == (stages, 3)
    assert (together.images, together.warnings) == (alone.images, alone.warnings)
    assert replace(together.times, queue_s=0, encode_s=0, file_s=0) == replace(
        alone.times, queue_s=0, encode_s=0, file_s=0
    )
    assert heard == [Progress(2, 3), Progress(3, 3), RanksDone()], "what is true when it is heard"


async def test_n_images_are_encoded_once(ranks: FakeRanks, loop: StepLoop) -> None:
    result = await last_of(loop.stream(replace(REQUEST, num_images=2)))
    assert [image.seed for image in result.images] == [5, 6]
    image = ["prepare", "denoise", "denoise", "denoise", "decode"]
    assert ranks.stages(1) == ["encode", *image, *image]


async def test_times_are_told(ranks: FakeRanks) -> None:
    told: list[str] = []
    loop = StepLoop(ranks, EncodedByRanks(), lambda stage, seconds: told.append(stage), files())
    times = (await last_of(loop.stream(REQUEST))).times
    assert min(times.queue_s, times.encode_s - 2 * ranks.stage_s) > 0
    assert (times.denoise_s, times.decode_s) == (3 * ranks.stage_s, ranks.stage_s)
    stages = ["encode", "prepare", "denoise", "denoise", "denoise", "decode"]
    assert told == ["prompt", *stages, "file"]
    assert times.replica_s == times.encode_s + times.denoise_s + times.decode_s
    assert times.file_s > 0


async def test_a_client_that_leaves_is_dropped_at_the_step_boundary(
    ranks: FakeRanks, loop: StepLoop
) -> None:
    ranks.gate.clear()
    leaver = asyncio.create_task(last_of(loop.stream(REQUEST)))
    bystander = asyncio.create_task(last_of(loop.stream(REQUEST)))
    await ranks.stepping.wait()

    leaver.cancel()
    await asyncio.wait([leaver])
    assert ranks.stages(1)[-1] == "denoise", "the step that runs is not interrupted"
    ranks.gate.set()

    assert (await bystander).images
    known = ["encode", "prepare", "denoise", "denoise"]
    assert ranks.stages(1) == [*known, "drop"], "nor the one that was sent ahead"


async def test_a_client_that_left_before_its_turn_is_skipped(
    ranks: FakeRanks, loop: StepLoop
) -> None:
    ranks.gate.clear()
    first = asyncio.create_task(last_of(loop.stream(REQUEST)))
    leaver = asyncio.create_task(last_of(loop.stream(REQUEST)))
    await ranks.stepping.wait()
    leaver.cancel()
    await asyncio.wait([leaver])
    ranks.gate.set()

    await first
    assert (await last_of(loop.stream(REQUEST))).images
    assert ranks.stages(2) == []


async def test_a_callers_mistake_fails_its_own_request_only(
    ranks: FakeRanks, loop: StepLoop
) -> None:
    ranks.errors["encode"] = BadReference("too small", "image")
    with pytest.raises(BadReference, match="too small"):
        await last_of(loop.stream(REQUEST))
    ranks.errors.clear()
    assert (await last_of(loop.stream(REQUEST))).images
    assert ranks.stages(1) == ["encode", "prepare", "drop"]


async def test_previews_come_between_the_steps(ranks: FakeRanks, loop: StepLoop) -> None:
    heard: list[RequestEvent] = []
    request = replace(REQUEST, num_previews=2, num_images=2)
    result = await last_of(loop.stream(request), heard.append)
    assert result.images == (await last_of(loop.stream(replace(REQUEST, num_images=2)))).images
    image = ["prepare", "denoise", "preview", "denoise", "preview", "denoise", "decode"]
    assert ranks.stages(1) == ["encode", *image, *image]
    previews = [news for news in heard if isinstance(news, Preview)]
    assert previews == [
        Preview("tiny", GeneratedImage(b"preview", seed), number)
        for number, seed in enumerate((5, 5, 6, 6))
    ]
    others = [news for news in heard if not isinstance(news, Preview)]
    finished = Finished("tiny", result.images[0], 0)
    assert [each for each in others if each != finished] == [
        *(Progress(number, 6) for number in range(1, 7)),
        RanksDone(),
    ]
    assert others.count(finished) == 1, "the last image is in the result"


async def test_previews_are_times_of_decoding(ranks: FakeRanks) -> None:
    told: list[tuple[str, float]] = []
    loop = StepLoop(ranks, EncodedByRanks(), lambda *stage: told.append(stage), files())
    times = (await last_of(loop.stream(replace(REQUEST, num_previews=1)))).times
    decoding = [seconds for stage, seconds in told if stage in ("preview", "decode")]
    assert len(decoding) == 2
    assert times.decode_s == pytest.approx(sum(decoding))


async def test_who_has_left_hears_nothing_more(ranks: FakeRanks, loop: StepLoop) -> None:
    heard: list[RequestEvent] = []
    ranks.gate.clear()
    leaver = asyncio.create_task(
        last_of(loop.stream(replace(REQUEST, num_previews=3)), heard.append)
    )
    await ranks.stepping.wait()
    leaver.cancel()
    await asyncio.wait([leaver])
    ranks.gate.set()
    await last_of(loop.stream(REQUEST))
    assert heard == []


async def test_one_call_is_sent_ahead(ranks: FakeRanks, loop: StepLoop) -> None:
    ranks.gate.clear()
    request = asyncio.create_task(last_of(loop.stream(REQUEST)))
    await ranks.stepping.wait()
    assert ranks.stages(1) == ["encode", "prepare", "denoise", "denoise"]
    ranks.gate.set()
    await request


async def test_the_next_job_begins_while_the_former_is_dropped(
    ranks: FakeRanks, loop: StepLoop
) -> None:
    ranks.gate.clear()
    leaver = asyncio.create_task(last_of(loop.stream(REQUEST)))
    other = asyncio.create_task(last_of(loop.stream(REQUEST)))
    await ranks.stepping.wait()
    leaver.cancel()
    ranks.gate.set()
    await other
    assert ranks.calls.index((2, "encode")) == ranks.calls.index((1, "drop")) + 1


async def test_a_broken_group_fails_what_waits_too(ranks: FakeRanks, loop: StepLoop) -> None:
    broken = ReplicaFailed("a rank died")
    ranks.errors = dict.fromkeys(("encode", "drop"), broken)
    answers = await asyncio.gather(
        last_of(loop.stream(REQUEST)), last_of(loop.stream(REQUEST)), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [ReplicaFailed, ReplicaFailed]


async def test_a_mistake_of_ours_ends_the_loop(ranks: FakeRanks, loop: StepLoop) -> None:
    ranks.errors["prepare"] = KeyError("a bug")
    stuck = asyncio.create_task(last_of(loop.stream(REQUEST)))
    await asyncio.wait([loop.pump])
    assert isinstance(loop.pump.exception(), KeyError)
    with pytest.raises(ReplicaFailed):
        await last_of(loop.stream(REQUEST))
    stuck.cancel()


async def test_requests_are_generated_in_order_of_arrival(ranks: FakeRanks, loop: StepLoop) -> None:
    results: list[ImageResult] = await asyncio.gather(
        *(last_of(loop.stream(replace(REQUEST, seed=seed))) for seed in range(5))
    )
    assert [result.images[0].seed for result in results] == list(range(5))
    jobs = [job for job, _ in ranks.calls]
    assert jobs == sorted(jobs)


async def test_ranks_are_told_how_much_work_a_call_is(ranks: FakeRanks, loop: StepLoop) -> None:
    references = (RgbImage(8, 4, b""), RgbImage(2, 2, b""))
    await last_of(loop.stream(replace(REQUEST, references=references)))
    assert ranks.sizes == {(64 * 64, 8 * 4 + 2 * 2)}


async def test_a_prompt_that_is_encoded_elsewhere_goes_to_the_ranks(ranks: FakeRanks) -> None:
    loop = StepLoop(ranks, FakeEncoder("embeds"), lambda stage, seconds: None, files())
    await last_of(loop.stream(replace(REQUEST, negative_prompt="a disc")))
    assert ranks.encoded == [(REQUEST.prompt, "a disc", "embeds")]


async def test_a_text_encoder_that_fails_costs_one_request(ranks: FakeRanks) -> None:
    encoder = FakeEncoder(ReplicaFailed("the text encoder died"))
    loop = StepLoop(ranks, encoder, lambda stage, seconds: None, files())
    with pytest.raises(ReplicaFailed, match="text encoder"):
        await last_of(loop.stream(REQUEST))
    assert ranks.calls == [], "the ranks never heard of it"
    encoder.answer = "embeds"
    assert (await last_of(loop.stream(REQUEST))).images


async def test_the_next_prompt_is_encoded_while_this_one_is_generated(ranks: FakeRanks) -> None:
    """And costs the ranks no time."""
    encoder = SlowEncoder()
    loop = StepLoop(ranks, encoder, lambda stage, seconds: None, files())
    ranks.gate.clear()
    first = asyncio.create_task(last_of(loop.stream(REQUEST)))
    await ranks.stepping.wait()
    second = asyncio.create_task(last_of(loop.stream(replace(REQUEST, prompt="a ring"))))
    async with asyncio.timeout(10):
        await encoder.encoded["a ring"].wait()
    assert ranks.stages(2) == [], "the ranks are in the middle of the first"
    ranks.gate.set()
    times = [(await each).times for each in (first, second)]
    assert ranks.encoded == [(REQUEST.prompt, "embeds"), ("a ring", "embeds")]
    waited_s = [each.encode_s - 2 * ranks.stage_s for each in times]
    assert waited_s[0] >= encoder.seconds > waited_s[1]


async def test_prompts_of_few_are_held_for_the_ranks(ranks: FakeRanks) -> None:
    """Each is megabytes."""
    encoder = SlowEncoder()
    loop = StepLoop(ranks, encoder, lambda stage, seconds: None, files())
    ranks.gate.clear()
    prompts = [f"prompt {number}" for number in range(6)]
    waiting = [
        asyncio.create_task(last_of(loop.stream(replace(REQUEST, prompt=prompt))))
        for prompt in prompts
    ]
    async with asyncio.timeout(10):
        await encoder.encoded[prompts[2]].wait()
        await asyncio.sleep(3 * encoder.seconds)
        assert not encoder.encoded[prompts[3]].is_set()
        ranks.gate.set()
        await asyncio.gather(*waiting)
    assert [prompt for prompt, _ in ranks.encoded] == prompts


async def test_a_prompt_that_fails_ahead_costs_neither_neighbour(ranks: FakeRanks) -> None:
    encoder = FakeEncoder("embeds")
    loop = StepLoop(ranks, encoder, lambda stage, seconds: None, files())
    ranks.gate.clear()
    first = asyncio.create_task(last_of(loop.stream(REQUEST)))
    await ranks.stepping.wait()
    encoder.answer = ReplicaFailed("the text encoder died")
    with pytest.raises(ReplicaFailed, match="text encoder"):
        await last_of(loop.stream(REQUEST))
    assert not first.done(), "who fails hears of it at once"
    encoder.answer = "embeds"
    ranks.gate.set()
    assert (await first).images
    assert (await last_of(loop.stream(REQUEST))).images
