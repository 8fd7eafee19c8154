"""From the leader's loop over a rank's line to a file: the pixels are diffusers' own."""

import asyncio
import io
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import TierArgs
from flux_ray.replica.rank import RankActor
from flux_ray.replica.rank_group import RankGroup
from flux_ray.replica.step_loop import StepLoop
from flux_ray.replica.text_encoder import EncodedByRanks
from flux_ray.replica.transport import RankConnection, RankServer, connect
from flux_ray.replica.watchdog import StepWatchdog
from flux_ray.request import Encoding, ImageFormat, ImageRequest, Preview, RequestEvent, last_of
from flux_ray.stages import StageAnswer
from flux_ray.tiny import KLEIN_CHECKPOINT, evaluate

torch.set_num_threads(1)
TINY = tier_for("tiny")
REQUEST = ImageRequest(
    "a", "tiny", "a red circle", 96, 64, num_steps=TINY.num_steps, guidance=TINY.guidance, seed=5
)


class ThreadedRank:
    """A rank on a thread of this process, and its line."""

    def __init__(self, line: RankConnection) -> None:
        self._line = line

    def call(self, frame: bytes) -> "asyncio.Future[list[StageAnswer]]":
        return self._line.call(frame)

    async def ping(self) -> int:
        return 1

    async def live(self) -> BaseException | None:
        await asyncio.wait([self._line.closed])
        return None


@pytest.fixture(scope="module")
def rank() -> RankActor:
    rank = RankActor(0, TierArgs(tier="tiny", device="cpu", dtype="float32"))
    rank.load(rank.create_store())
    return rank


@pytest.fixture
async def loop(rank: RankActor) -> AsyncIterator[StepLoop]:
    extension = RankServer("127.0.0.1")
    thread = threading.Thread(target=extension.answer, args=(rank.run,), daemon=True)
    thread.start()
    line = await connect(extension.address)
    group = RankGroup([ThreadedRank(line)], StepWatchdog(600, 600), end=lambda: None)
    yield StepLoop(group, EncodedByRanks(), lambda stage, seconds: None)
    line.close()
    await asyncio.to_thread(thread.join, 30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    generated = evaluate.load_pipeline(KLEIN_CHECKPOINT)(
        prompt=REQUEST.prompt,
        width=REQUEST.width,
        height=REQUEST.height,
        num_inference_steps=REQUEST.num_steps,
        guidance_scale=REQUEST.guidance,
        max_sequence_length=TINY.text_length,
        generator=torch.Generator().manual_seed(REQUEST.seed),
    )
    return np.asarray(generated.images[0])


def former(expected: np.ndarray, encoding: Encoding) -> bytes:
    """The file as Pillow made it on the rank."""
    image, buffer = Image.fromarray(expected), io.BytesIO()
    if encoding.scaled_to is not None:
        image = image.resize(encoding.scaled_to, Image.Resampling.LANCZOS)
    options = {} if encoding.format == "png" else {"quality": encoding.quality}
    image.save(buffer, encoding.format, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("scaled_to", [None, (192, 128), (1024, 680)])
async def test_a_png_has_the_pixels_that_it_always_had(
    loop: StepLoop, expected: np.ndarray, scaled_to: tuple[int, int] | None
) -> None:
    encoding = Encoding(scaled_to=scaled_to)
    (image,) = (await last_of(loop.stream(replace(REQUEST, encoding=encoding)))).images
    assert image.seed == REQUEST.seed
    assert np.array_equal(pixels_of(image.data), pixels_of(former(expected, encoding)))


@pytest.mark.parametrize("format", ["jpeg", "webp"])
async def test_other_formats_are_the_same_files(
    loop: StepLoop, expected: np.ndarray, format: ImageFormat
) -> None:
    encoding = Encoding(format, quality=80)
    (image,) = (await last_of(loop.stream(replace(REQUEST, encoding=encoding)))).images
    assert image.data == former(expected, encoding)


async def test_previews_are_scaled_as_their_image_is(loop: StepLoop) -> None:
    heard: list[RequestEvent] = []
    encoding = Encoding(scaled_to=(48, 32))
    await last_of(loop.stream(replace(REQUEST, num_previews=2, encoding=encoding)), heard.append)
    previews = [pixels_of(news.image.data) for news in heard if isinstance(news, Preview)]
    assert [pixels.shape for pixels in previews] == [(32, 48, 3)] * 2
