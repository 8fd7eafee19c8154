"""Whether a request kept its promise, and what is counted of it otherwise."""

import asyncio
from dataclasses import replace

import pytest

from flux_ray.config import Alias
from flux_ray.errors import (
    BadRequest,
    DeadlinePassed,
    FluxError,
    Overloaded,
    RateLimited,
    ReplicaFailed,
    TierUnavailable,
)
from flux_ray.request import ImageRequest
from flux_ray.router.accounting import promised
from flux_ray.router.pricing import CostModel, ReplicaSpec
from flux_ray.router.quote import Caller
from flux_ray.router.router import Router, Terms
from tests.conftest import FakeBill, FakeHandles, FakeTurns

REQUEST = ImageRequest("r", "tiny", "a red circle", 64, 64, 4, 1.0, seed=1)
GOLD = Caller(key_class="gold")


async def test_images_in_time_keep_the_promise(router: Router, bill: FakeBill) -> None:
    await router.generate(REQUEST, GOLD)
    assert bill.promises == [("tiny", "gold", True)]


async def test_images_that_come_late_break_it(bill: FakeBill) -> None:
    with promised(bill, GOLD, deadline_s=0.01) as try_tier:
        try_tier("tiny")
        await asyncio.sleep(0.02)
    assert bill.promises == [("tiny", "gold", False)]


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("no time"),
        TierUnavailable("no replica"),
        DeadlinePassed("late"),
        RuntimeError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_images_break_it(bill: FakeBill, error: Exception) -> None:
    with pytest.raises(type(error)), promised(bill, GOLD, 5.0) as try_tier:
        try_tier("tiny")
        raise error
    assert bill.promises == [("tiny", "gold", False)]


@pytest.mark.parametrize(
    "error",
    [BadRequest("wrong"), RateLimited("too many"), asyncio.CancelledError()],
    ids=lambda error: type(error).__name__,
)
def test_what_is_the_callers_own_doing_is_not_counted(bill: FakeBill, error: BaseException) -> None:
    with pytest.raises(type(error)), promised(bill, GOLD, 5.0) as try_tier:
        try_tier("tiny")
        raise error
    assert bill.promises == []


async def test_a_job_has_no_promise(router: Router, bill: FakeBill) -> None:
    await router.generate(REQUEST, replace(GOLD, is_job=True))
    assert bill.promises == []


async def test_an_alias_promises_once_for_all_its_tiers(
    handles: FakeHandles, turns: FakeTurns, bill: FakeBill
) -> None:
    prices = CostModel({tier: ReplicaSpec("cpu") for tier in ("tiny", "tiny-tp2")})
    router = Router(handles, turns, prices, bill, Terms(request_timeout_s=5))
    turns.refusals = [Overloaded("full")]
    alias = Alias(tiers=("tiny-tp2", "tiny"))
    await router.generate_by(alias, [replace(REQUEST, tier="tiny-tp2"), REQUEST], GOLD)
    assert len(turns.submissions) == 2
    [refused] = bill.refusals
    assert refused[1] == "overloaded"
    assert [(key_class, kept) for _, key_class, kept in bill.promises] == [("gold", True)]
    assert bill.promises[0][0] != refused[0], "the tier that made the images"


@pytest.mark.parametrize("error", [Overloaded("full"), TierUnavailable("gone")])
async def test_a_refusal_is_counted_by_the_code_of_its_error(
    router: Router, turns: FakeTurns, bill: FakeBill, error: FluxError
) -> None:
    turns.refusals = [error]
    with pytest.raises(FluxError):
        await router.generate(REQUEST)
    assert bill.refusals == [("tiny", error.code)]


def test_a_tier_that_is_not_deployed_is_counted_as_a_refusal(bill: FakeBill) -> None:
    router = Router(None, None, None, bill, Terms(5), is_deployed=lambda tier: False)
    with pytest.raises(TierUnavailable):
        router.deployed([REQUEST])
    assert bill.refusals == [("tiny", "tier_unavailable")]


async def test_a_second_try_is_counted(
    router: Router, handles: FakeHandles, bill: FakeBill
) -> None:
    handles.failures = [ReplicaFailed("a rank died")]
    await router.generate(REQUEST)
    assert bill.retries == ["tiny"]
    assert [kept for _, _, kept in bill.promises] == [True]
