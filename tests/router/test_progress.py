"""Who asks by a request's id hears how far it has come, as long as it is drawn."""

import asyncio

import pytest

from flux_ray.errors import ReplicaFailed
from flux_ray.request import Hear, ImageRequest, ImageResult, Progress, StageTimes
from flux_ray.router.caller import ANYONE
from flux_ray.router.progress import Followed

REQUEST = ImageRequest("id", "tiny", "a ring", 128, 128, 4, 1.0, seed=7, num_previews=2)
RESULT = ImageResult("id", "tiny", (), StageTimes(0, 0, 0, 0))


async def test_progress_is_that_of_the_latest_step() -> None:
    gate = asyncio.Event()

    async def draw(request: ImageRequest, hear: Hear) -> ImageResult:
        for num_done in (1, 2, 3, 1):
            hear(Progress(num_done, 4))
            await gate.wait()
            gate.clear()
        return RESULT

    followed = Followed(draw)
    drawing = asyncio.create_task(followed.generate(REQUEST))
    seen = []
    for _ in range(4):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        seen.append(followed.progress_of("id"))
        gate.set()
    assert await drawing == RESULT
    assert seen == [0.25, 0.5, 0.75, 0.25], "a second replica begins anew"
    assert followed.progress_of("id") is None
    assert followed.progress_of("another") is None


async def test_a_request_that_failed_is_forgotten() -> None:
    async def draw(request: ImageRequest, hear: Hear) -> ImageResult:
        hear(Progress(1, 4))
        raise ReplicaFailed("died")

    followed = Followed(draw)
    with pytest.raises(ReplicaFailed):
        await followed.generate(REQUEST)
    assert followed.progress_of("id") is None


async def test_a_router_can_be_followed(router, handles) -> None:
    followed = Followed(lambda request, hear: router.generate(request, ANYONE, hear))
    result = await followed.generate(REQUEST)
    assert [image.seed for image in result.images] == [7]
    assert handles.requests == [REQUEST]
