"""A rank without Ray: the engine's stages by job number."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from flux_ray.config import Parallel, TierArgs
from flux_ray.errors import BadReference
from flux_ray.parallel.mesh import LockstepBroken, Mesh
from flux_ray.replica.rank import RankActor, StageFailed
from flux_ray.request import Encoding, ImageRequest, Raster
from tests.ranks import Ranks

torch.set_num_threads(1)
ARGS = TierArgs(tier="tiny", device="cpu", dtype="float32")
REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 96, num_steps=2, guidance=1.0, seed=5)


def draw(rank: RankActor, job: int, request: ImageRequest) -> bytes | None:
    rank.encode(job, request)
    rank.prepare(job, request.seed)
    for _ in range(request.num_steps):
        rank.denoise(job)
    image = rank.decode(job)
    rank.drop(job)
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
        rank.encode(2, each)
        rank.prepare(2, REQUEST.seed)
        rank.denoise(2)
        preview = rank.preview(2)
        rank.denoise(2)
        final = rank.decode(2)
        rank.drop(2)
        assert preview is not None and final is not None
        image = Image.open(io.BytesIO(preview.data))
        assert (image.format, image.size) == (each.encoding.format.upper(), (64, 96))
        assert preview.seed == REQUEST.seed
    assert final.data == plain != preview.data


def test_a_dropped_job_leaves_nothing(rank: RankActor) -> None:
    rank.encode(1, REQUEST)
    rank.drop(1)
    rank.drop(1)
    with pytest.raises(StageFailed, match="KeyError: 1"):
        rank.denoise(1)
    assert not rank._drawings


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
    assert len(stages) == 4 + REQUEST.num_steps


def test_a_callers_mistake_stays_what_it_is(rank: RankActor) -> None:
    flat = Raster(800, 64, bytes(800 * 64 * 3))
    with pytest.raises(BadReference):
        rank.encode(1, replace(REQUEST, references=(flat,)))
    with pytest.raises(BadReference):
        rank.prepare(1, REQUEST.seed)  # It was sent before the leader heard.
    rank.drop(1)
    assert draw(rank, 1, REQUEST)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA has 3 MB"), MemoryError()])
def test_out_of_memory_is_told_in_words(
    rank: RankActor, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The error itself is not: where it arrives, it would load torch."""

    def fail(state: object) -> None:
        raise error

    monkeypatch.setattr(rank._adapter, "denoise", fail)
    rank.encode(1, REQUEST)
    rank.prepare(1, 1)
    with pytest.raises(StageFailed, match=r"out of memory: (OutOf)?MemoryError"):
        rank.denoise(1)
    rank.drop(1)


def come(mesh: Mesh, jobs: tuple[int, ...], stages: tuple[str, ...]) -> str:
    rank = RankActor.__new__(RankActor)
    rank._mesh, rank._num_calls = mesh, 0
    rank.agree(7, "encode")
    try:
        rank.agree(jobs[mesh.world.rank], stages[mesh.world.rank])
    except LockstepBroken:
        return "broken"
    return "agreed"


@pytest.mark.parametrize(
    ("jobs", "stages", "expected"),
    [
        ((1, 1, 1), ("denoise",) * 3, "agreed"),
        ((1, 1, 2), ("denoise",) * 3, "broken"),
        ((1, 1, 1), ("denoise", "drop", "denoise"), "broken"),
    ],
    ids=["the same", "another job", "another stage"],
)
def test_ranks_work_only_on_the_same_thing(
    run_ranks: Ranks, jobs: tuple[int, ...], stages: tuple[str, ...], expected: str
) -> None:
    assert run_ranks(Parallel(tensor=3), come, jobs, stages) == [expected] * 3
