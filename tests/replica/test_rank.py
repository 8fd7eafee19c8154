"""A rank without Ray: the engine's stages by job number."""

import io
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from flux_ray.config import Parallel, TierArgs
from flux_ray.errors import BadReference
from flux_ray.parallel.mesh import LockstepBroken, Mesh
from flux_ray.replica.line import StageFailed
from flux_ray.replica.rank import RankActor
from flux_ray.request import Encoding, ImageRequest, Raster
from tests.ranks import Ranks

torch.set_num_threads(1)
ARGS = TierArgs(tier="tiny", device="cpu", dtype="float32")
REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 96, num_steps=2, guidance=1.0, seed=5)


def run(rank: RankActor, job: int, stages: str, request: ImageRequest | None = None) -> list[Any]:
    """What they answer; the request comes with the first."""
    return [answer.value for answer in rank.run(job, tuple(stages.split()), request)]


def draw(rank: RankActor, job: int, request: ImageRequest) -> bytes | None:
    run(rank, job, "encode prepare", request)
    image = run(rank, job, "denoise " * request.num_steps + "decode")[-1]
    return image and image.data


@pytest.fixture(scope="module")
def rank() -> RankActor:
    rank = RankActor(0, ARGS)
    rank.load(rank.meet())
    return rank


def test_logs_say_whose_rank_it_is(rank: RankActor) -> None:
    assert repr(rank) == "tiny rank 0"


def test_a_picture_of_the_size_and_format(rank: RankActor) -> None:
    data = draw(rank, 1, replace(REQUEST, encoding=Encoding("webp")))
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("WEBP", (64, 96))


def test_previews_are_pictures_of_the_same_kind_and_change_nothing(rank: RankActor) -> None:
    plain = draw(rank, 1, REQUEST)
    request = replace(REQUEST, num_previews=1, encoding=Encoding("jpeg"))
    with_preview = replace(REQUEST, num_previews=1)
    for each in (request, with_preview):
        *_, preview = run(rank, 2, "encode prepare denoise preview", each)
        *_, final = run(rank, 2, "denoise decode")
        assert preview is not None and final is not None
        image = Image.open(io.BytesIO(preview.data))
        assert (image.format, image.size) == (each.encoding.format.upper(), (64, 96))
        assert preview.seed == REQUEST.seed
    assert final.data == plain != preview.data


def test_a_dropped_job_leaves_nothing(rank: RankActor) -> None:
    run(rank, 1, "encode", REQUEST)
    run(rank, 1, "drop")
    run(rank, 1, "drop")
    with pytest.raises(StageFailed, match="KeyError: 1"):
        run(rank, 1, "denoise")
    assert not rank._drawings


def test_a_job_is_over_with_its_last_picture(rank: RankActor) -> None:
    request = replace(REQUEST, num_images=2)
    image = "prepare denoise denoise decode"
    *_, first = run(rank, 1, f"encode {image}", request)
    assert rank._drawings
    *_, second = run(rank, 1, image)
    assert not rank._drawings
    assert (first.seed, second.seed) == request.seeds
    assert first.data == draw(rank, 1, REQUEST)
    assert second.data == draw(rank, 1, replace(REQUEST, seed=REQUEST.seed + 1))


def test_each_stage_says_what_it_took(rank: RankActor) -> None:
    began = time.perf_counter()
    answers = rank.run(1, ("encode", "prepare", "denoise", "drop"), REQUEST)
    taken_s = time.perf_counter() - began
    assert min(answer.seconds for answer in answers) > 0
    assert taken_s / 2 < sum(answer.seconds for answer in answers) < taken_s


def test_only_rank_0_decodes(rank: RankActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "_rank", 1)
    assert draw(rank, 1, REQUEST) is None


def test_a_stage_ends_when_the_card_has_done_it(
    rank: RankActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: stages.append("done"))
    draw(rank, 1, REQUEST)
    assert stages == []
    monkeypatch.setattr(rank, "_args", ARGS.model_copy(update={"device": "cuda"}))
    draw(rank, 1, REQUEST)
    assert len(stages) == 3 + REQUEST.num_steps


def test_a_callers_mistake_stays_what_it_is(rank: RankActor) -> None:
    flat = Raster(800, 64, bytes(800 * 64 * 3))
    with pytest.raises(BadReference):
        run(rank, 1, "encode prepare", replace(REQUEST, references=(flat,)))
    with pytest.raises(BadReference):
        run(rank, 1, "denoise decode")  # It was sent before the leader heard.
    run(rank, 1, "drop")
    assert draw(rank, 1, REQUEST)


def test_a_rank_knows_its_card(rank: RankActor) -> None:
    assert rank.card() == "cpu"


def come(mesh: Mesh, jobs: tuple[int, ...], calls: tuple[tuple[str, ...], ...]) -> str:
    rank = RankActor.__new__(RankActor)
    rank._mesh, rank._num_calls = mesh, 0
    rank.agree(7, ("encode",))
    try:
        rank.agree(jobs[mesh.world.rank], calls[mesh.world.rank])
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
