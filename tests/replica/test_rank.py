"""A rank without Ray: the engine's stages by job number."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from flux_ray.config import TierArgs
from flux_ray.replica.rank import RankActor
from flux_ray.request import Encoding, ImageRequest

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
    return RankActor(0, ARGS)


def test_a_picture_of_the_size_and_format(rank: RankActor) -> None:
    data = draw(rank, 1, replace(REQUEST, encoding=Encoding("webp")))
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("WEBP", (64, 96))


def test_a_dropped_job_leaves_nothing(rank: RankActor) -> None:
    rank.encode(1, REQUEST)
    rank.drop(1)
    rank.drop(1)
    with pytest.raises(KeyError):
        rank.denoise(1)
    assert not rank._drawings


def test_only_rank_0_decodes(rank: RankActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "_rank", 1)
    assert draw(rank, 1, REQUEST) is None
