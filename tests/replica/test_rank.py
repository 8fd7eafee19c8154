"""A rank without Ray: the engine's stages by job number."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.errors import BadReference
from flux_ray.parallel.mesh import LockstepBroken, Mesh
from flux_ray.replica.rank import RankActor
from flux_ray.replica.timer import Launched
from flux_ray.replica.transport import StageFailed
from flux_ray.request import ImageRequest, RgbImage
from tests.ranks import Ranks

torch.set_num_threads(1)
ARGS = TierArgs(tier="tiny", device="cpu", dtype="float32")
REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 96, num_steps=2, guidance=1.0, seed=5)


class FakeCard:
    """Takes a quarter of a second a stage, on a clock of its own, once somebody waits for it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.queued_ms = 0.0
        self.fault: Exception | None = None

    def queue(self, stage: Callable[[int], object], job: int) -> object:
        """What a stage of the rank does with it."""
        self.log.append("stage")
        self.queued_ms += 250.0
        return stage(job)

    def event(self, *, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    """A place in the queue of a fake card."""

    def __init__(self, card: FakeCard) -> None:
        self._card = card
        self._at_ms = -1.0

    def record(self) -> None:
        self._at_ms = self._card.queued_ms

    def query(self) -> bool:
        return "wait" in self._card.log

    def synchronize(self) -> None:
        self._card.log.append("wait")
        if self._card.fault is not None:
            raise self._card.fault

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self._card.log[-1] == "wait", "asked of a card that may not have come so far"
        return end._at_ms - self._at_ms


def run(rank: RankActor, job: int, stages: str, request: ImageRequest | None = None) -> list[Any]:
    """What they answer; the request comes with the first."""
    answers = rank.run(job, tuple(stages.split()), request)
    assert isinstance(answers, list)
    return [answer.value for answer in answers]


def generate(rank: RankActor, job: int, request: ImageRequest) -> bytes | None:
    run(rank, job, "encode prepare", request)
    image = run(rank, job, "denoise " * request.num_steps + "decode")[-1]
    return image and image.raster.rgb


@pytest.fixture(scope="module")
def rank() -> RankActor:
    rank = RankActor(0, ARGS)
    rank.load(rank.create_store())
    return rank


def test_logs_say_whose_rank_it_is(rank: RankActor) -> None:
    assert repr(rank) == "tiny rank 0"


def test_an_image_is_answered_as_its_pixels(rank: RankActor) -> None:
    *_, image = run(rank, 1, "encode prepare denoise denoise decode", REQUEST)
    raster = image.raster
    assert (raster.width, raster.height, len(raster.rgb)) == (64, 96, 64 * 96 * 3)
    assert image.seed == REQUEST.seed


def test_previews_are_images_of_the_same_kind_and_change_nothing(rank: RankActor) -> None:
    plain = generate(rank, 1, REQUEST)
    *_, preview = run(rank, 2, "encode prepare denoise preview", replace(REQUEST, num_previews=1))
    *_, final = run(rank, 2, "denoise decode")
    assert (preview.raster.width, preview.raster.height) == (64, 96)
    assert preview.seed == final.seed == REQUEST.seed
    assert final.raster.rgb == plain != preview.raster.rgb


def test_a_dropped_job_leaves_nothing(rank: RankActor) -> None:
    run(rank, 1, "encode", REQUEST)
    run(rank, 1, "drop")
    run(rank, 1, "drop")
    with pytest.raises(StageFailed, match="KeyError: 1"):
        run(rank, 1, "denoise")
    assert not rank._jobs


def test_a_job_is_over_with_its_last_image(rank: RankActor) -> None:
    request = replace(REQUEST, num_images=2)
    image = "prepare denoise denoise decode"
    *_, first = run(rank, 1, f"encode {image}", request)
    assert rank._jobs
    *_, second = run(rank, 1, image)
    assert not rank._jobs
    assert (first.seed, second.seed) == request.seeds
    assert first.raster.rgb == generate(rank, 1, REQUEST)
    assert second.raster.rgb == generate(rank, 1, replace(REQUEST, seed=REQUEST.seed + 1))


def test_each_stage_says_what_it_took(rank: RankActor) -> None:
    began = time.perf_counter()
    answers = rank.run(1, ("encode", "prepare", "denoise", "drop"), REQUEST)
    assert isinstance(answers, list)
    taken_s = time.perf_counter() - began
    assert min(answer.seconds for answer in answers) > 0
    assert taken_s / 2 < sum(answer.seconds for answer in answers) < taken_s


def test_only_rank_0_decodes(rank: RankActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "_rank", 1)
    assert generate(rank, 1, REQUEST) is None


@pytest.fixture
def card(rank: RankActor, monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    """The rank takes it for its own."""
    card = FakeCard()
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    monkeypatch.setattr(rank, "_args", ARGS.model_copy(update={"device": "cuda"}))
    for name in ("encode", "prepare", "denoise"):
        monkeypatch.setattr(rank, name, partial(card.queue, getattr(rank, name)))
    return card


def test_the_card_is_waited_for_once_a_call(rank: RankActor, card: FakeCard) -> None:
    """Each stage's time is the card's, and its queue is never emptied in between."""
    answers = rank.run(1, ("encode", "prepare", "denoise", "denoise"), REQUEST)
    assert isinstance(answers, list)
    assert card.log == ["stage"] * 4 + ["wait"]
    assert [answer.seconds for answer in answers] == pytest.approx([0.25] * 4)
    run(rank, 1, "drop")


def test_steps_are_queued_behind_each_other(rank: RankActor, card: FakeCard) -> None:
    """Each call's answer is its own, whenever it is asked for."""
    rank.run(1, ("encode", "prepare"), REQUEST)
    card.log.clear()
    first, second = rank.run(1, ("denoise",)), rank.run(1, ("denoise",))
    assert isinstance(first, Launched) and isinstance(second, Launched)
    assert card.log == ["stage"] * 2, "nobody has waited"
    assert not first.is_done()
    assert [answer.seconds for answer in first.outcome()] == [0.25]
    assert [answer.seconds for answer in second.outcome()] == [0.25]
    run(rank, 1, "drop")


def test_a_fault_of_a_kernel_is_told_in_words(rank: RankActor, card: FakeCard) -> None:
    rank.run(1, ("encode", "prepare"), REQUEST)
    launched = rank.run(1, ("denoise",))
    assert isinstance(launched, Launched)
    card.fault = RuntimeError("CUDA error: an illegal memory access")
    with pytest.raises(StageFailed, match="RuntimeError: CUDA error: an illegal"):
        launched.outcome()
    card.fault = None
    run(rank, 1, "drop")


def test_a_callers_mistake_stays_what_it_is(rank: RankActor) -> None:
    flat = RgbImage(800, 64, bytes(800 * 64 * 3))
    with pytest.raises(BadReference):
        run(rank, 1, "encode prepare", replace(REQUEST, references=(flat,)))
    with pytest.raises(BadReference):
        run(rank, 1, "denoise decode")  # It was sent before the leader heard.
    run(rank, 1, "drop")
    assert generate(rank, 1, REQUEST)


def test_a_rank_knows_its_card(rank: RankActor) -> None:
    assert rank.card() == "cpu"


def come(mesh: Mesh, jobs: tuple[int, ...], calls: tuple[tuple[str, ...], ...]) -> str:
    rank = RankActor.__new__(RankActor)
    rank._mesh, rank._num_calls = mesh, 0
    rank.check_lockstep(7, ("encode",))
    try:
        rank.check_lockstep(jobs[mesh.world.rank], calls[mesh.world.rank])
    except LockstepBroken:
        return "broken"
    return "agreed"


@pytest.mark.parametrize(
    ("jobs", "calls", "expected"),
    [
        ((1, 1, 1), (("denoise",),) * 3, "agreed"),
        ((1, 1, 2), (("denoise",),) * 3, "broken"),
        ((1, 1, 1), (("denoise",), ("drop",), ("denoise",)), "broken"),
        ((1, 1, 1), (("denoise",), ("denoise",), ("denoise", "denoise")), "broken"),
    ],
    ids=["the same", "another job", "another stage", "a stage more"],
)
def test_ranks_work_only_on_the_same_thing(
    run_ranks: Ranks, jobs: tuple[int, ...], calls: tuple[tuple[str, ...], ...], expected: str
) -> None:
    assert run_ranks(Parallel(tensor=3), come, jobs, calls) == [expected] * 3
