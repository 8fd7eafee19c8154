"""One retry when a replica dies, with the same request; none for anything else; a deadline."""

import asyncio

import pytest

from flux_ray.errors import BadRequest, DeadlinePassed, ReplicaFailed, TierUnavailable
from flux_ray.request import ImageRequest
from flux_ray.router.router import Router

REQUEST = ImageRequest("id", "tiny", "a ring", 128, 128, 4, 1.0, seed=7)


async def test_result_comes_back(handles):
    result = await Router(handles, request_timeout_s=5).generate(REQUEST)
    assert [image.seed for image in result.images] == [7]
    assert handles.requests == [REQUEST]


async def test_a_dead_replica_is_tried_once_more_with_the_same_request(handles):
    handles.failures = [ReplicaFailed("died")]
    await Router(handles, request_timeout_s=5).generate(REQUEST)
    assert handles.requests == [REQUEST, REQUEST]


async def test_a_second_death_reaches_the_caller(handles):
    handles.failures = [ReplicaFailed("died"), ReplicaFailed("died again")]
    with pytest.raises(ReplicaFailed, match="died again"):
        await Router(handles, request_timeout_s=5).generate(REQUEST)
    assert len(handles.requests) == 2


@pytest.mark.parametrize(
    "failure", [TierUnavailable("down"), BadRequest("bad"), RuntimeError(), TimeoutError("theirs")]
)
async def test_other_failures_are_not_tried_again(handles, failure):
    handles.failures = [failure]
    with pytest.raises(type(failure)) as caught:
        await Router(handles, request_timeout_s=5).generate(REQUEST)
    assert caught.value is failure
    assert len(handles.requests) == 1


class SlowHandles:
    """Replicas that never answer."""

    def __init__(self):
        self.was_cancelled = False

    async def generate(self, request):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


async def test_the_deadline_cancels_the_attempt():
    handles = SlowHandles()
    with pytest.raises(DeadlinePassed, match=r"0\.01 seconds"):
        await Router(handles, request_timeout_s=0.01).generate(REQUEST)
    assert handles.was_cancelled


async def test_a_client_that_leaves_cancels_the_attempt():
    handles = SlowHandles()
    task = asyncio.create_task(Router(handles, request_timeout_s=5).generate(REQUEST))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handles.was_cancelled


async def test_ready_tiers_are_the_handles(handles):
    assert await Router(handles, request_timeout_s=5).ready_tiers() == ("tiny",)
