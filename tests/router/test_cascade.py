"""A preview while the final images are drawn, of one request on two tiers."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from flux_ray.errors import Overloaded, TierUnavailable
from flux_ray.request import GeneratedImage, ImageRequest, ImageResult, StageTimes
from flux_ray.router.cascade import cascade
from flux_ray.router.quote import ANYONE

FINAL = ImageRequest("id", "flux-2-dev", "a ring", 1024, 1024, 50, 4.0, seed=7)
PREVIEW = replace(FINAL, tier="flux-2-klein-4b", num_steps=4)


class FakeRouter:
    """Tiers that answer when they are told to."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.answers = {tier: loop.create_future() for tier in (FINAL.tier, PREVIEW.tier)}

    async def generate(self, request, caller):
        await self.answers[request.tier]
        images = (GeneratedImage(b"", request.seed),)
        return ImageResult(request.request_id, request.tier, images, StageTimes(0, 0, 0, 0))

    def answer(self, request: ImageRequest, error: Exception | None = None) -> None:
        if error is None:
            self.answers[request.tier].set_result(None)
        else:
            self.answers[request.tier].set_exception(error)


def is_final(event) -> bool:
    return isinstance(event, ImageResult)


@pytest.fixture
async def router() -> FakeRouter:
    return FakeRouter()


async def test_the_preview_comes_first(router):
    router.answer(PREVIEW)
    async with aclosing(cascade(router, PREVIEW, FINAL, ANYONE)) as parts:
        early = await anext(parts)
        router.answer(FINAL)
        late = await anext(parts)
    assert [(each.tier, is_final(each)) for each in (early, late)] == [
        (PREVIEW.tier, False),
        (FINAL.tier, True),
    ]
    assert late.request_id == "id"


async def test_a_late_preview_is_of_no_use(router):
    router.answer(FINAL)
    parts = [is_final(each) async for each in cascade(router, PREVIEW, FINAL, ANYONE)]
    assert parts == [True]
    assert router.answers[PREVIEW.tier].cancelled(), "nobody draws it any more"


async def test_a_preview_that_fails_costs_only_itself(router):
    router.answer(PREVIEW, TierUnavailable("down"))
    asyncio.get_running_loop().call_later(0.01, router.answer, FINAL)
    parts = [is_final(each) async for each in cascade(router, PREVIEW, FINAL, ANYONE)]
    assert parts == [True]


async def test_a_refusal_of_the_final_ends_the_preview(router):
    router.answer(FINAL, Overloaded("too late"))
    with pytest.raises(Overloaded):
        await anext(cascade(router, PREVIEW, FINAL, ANYONE))
    assert router.answers[PREVIEW.tier].cancelled()


async def test_who_leaves_after_the_preview_ends_the_final(router):
    router.answer(PREVIEW)
    async with aclosing(cascade(router, PREVIEW, FINAL, ANYONE)) as parts:
        await anext(parts)
    assert router.answers[FINAL.tier].cancelled()
