"""The spans of a request's stages, as the step loop of its replica makes them."""

import asyncio
import math
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan

from flux_ray.errors import ReplicaFailed
from flux_ray.replica.step_loop import StepLoop
from flux_ray.replica.text_encoder import EncodedByRanks
from flux_ray.request import ImageRequest, RgbImage, last_of
from flux_ray.stages import DenoisedImage, Encoded, EncodedPrompt, StageAnswer
from flux_ray.tracing import REQUEST, request_span
from tests.spans import by_name, kept_spans

ASKED = ImageRequest("a", "tiny", "a secret ring", 64, 64, num_steps=4, guidance=1.0, seed=5)
STAGE_S = 0.01


class TimedRanks:
    """Ranks whose stages take STAGE_S; `fails` is a stage at which they are lost."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.turn = asyncio.Lock()

    def longest_s(self, stage: str, sizes: tuple[int, ...]) -> float:
        # Stages that were never seen have calls of their own.
        return math.inf if self.fails else STAGE_S

    async def run(
        self, job: int, stages: tuple[str, ...], sizes: tuple[int, ...], *payload: object
    ) -> list[StageAnswer]:
        async with self.turn:
            if self.fails in stages:
                raise ReplicaFailed("a rank died")
            began = time.perf_counter()
            await asyncio.sleep(STAGE_S * len(stages))
            each_s = (time.perf_counter() - began) / len(stages)
        return [StageAnswer(self.value(stage), each_s) for stage in stages]

    def value(self, stage: str) -> object:
        if stage == "encode":
            return Encoded((), is_cached=False)
        image = DenoisedImage(RgbImage(1, 1, b"rgb"), 5)
        return image if stage in ("decode", "preview") else None


class SharedEncoder:
    """A shared text encoder that takes a moment."""

    async def wait_until_loaded(self) -> None: ...

    async def encode_prompts(self, prompts: tuple[str, ...]) -> tuple[EncodedPrompt, ...]:
        await asyncio.sleep(STAGE_S)
        return (EncodedPrompt(()),)


async def spans_of(
    request: ImageRequest, ranks: TimedRanks | None = None, prompts: Any = None
) -> tuple[list[ReadableSpan], ReadableSpan]:
    """Return the spans of the stages, by their beginning, and the one above them."""
    with kept_spans() as spans:
        loop = StepLoop(
            ranks or TimedRanks(), prompts or EncodedByRanks(), lambda stage, seconds: None
        )
        with request_span({}, {}):
            await asyncio.gather(last_of(loop.stream(request)), return_exceptions=True)
        loop.pump.cancel()
    found = [each for each in spans.get_finished_spans() if each.name != REQUEST]
    return sorted(found, key=lambda each: each.start_time or 0), by_name(spans)[REQUEST]


async def test_all_stages_follow_each_other_below_the_request() -> None:
    made, above = await spans_of(replace(ASKED, num_images=2))
    on_ranks = [each for each in made if each.name != "file"]
    one = ["prepare", "denoise", "decode"]
    assert [each.name for each in on_ranks] == ["replica queue", "encode", *one, *one]
    assert len(made) - len(on_ranks) == 2, "files, which are made beside the next image"
    assert all(each.parent == above.context for each in made)
    for before, after in pairwise(on_ranks):
        assert (before.end_time or 0) <= (after.start_time or 0) + 1000
    assert (above.start_time or 0) - 2e6 <= (made[0].start_time or 0)
    assert (made[-1].end_time or 0) <= (above.end_time or 0) + 2e6
    steps = [each.attributes or {} for each in made if each.name == "denoise"]
    assert [each["flux.num_runs"] for each in steps] == [4, 4]
    assert "secret" not in "".join(each.to_json() for each in made)


async def test_a_preview_has_its_stage_and_its_file() -> None:
    made, _ = await spans_of(replace(ASKED, num_previews=1))
    names = [each.name for each in made]
    assert [name for name in names if name not in ("file", "replica queue")] == [
        "encode",
        "prepare",
        "denoise",
        "preview",
        "denoise",
        "decode",
    ]
    assert names.count("file") == 2


async def test_a_shared_text_encoder_has_its_stage() -> None:
    made, _ = await spans_of(ASKED, prompts=SharedEncoder())
    assert "prompt" in [each.name for each in made]
    prompt = next(each for each in made if each.name == "prompt")
    encode = next(each for each in made if each.name == "encode")
    assert (prompt.end_time or 0) <= (encode.start_time or 0)


async def test_a_failure_leaves_the_stages_before_it() -> None:
    made, _ = await spans_of(ASKED, TimedRanks(fails="decode"))
    names = [each.name for each in made]
    assert "encode" in names and "decode" not in names
