"""A leader without Serve: what it makes of calls, and what it says of itself."""

import threading
from contextlib import contextmanager
from typing import Any

import pytest

from flux_ray.catalog import TIERS, Tier
from flux_ray.config import TierArgs
from flux_ray.errors import NotKept, ProtocolMismatch
from flux_ray.replica import leader as module
from flux_ray.replica.leader import Leader, RunningRequests, warm_up_request
from flux_ray.request import (
    PROTOCOL,
    EventStream,
    GeneratedImage,
    ImageRequest,
    ImageResult,
    Progress,
    StageTimes,
)
from flux_ray.weights.source import WeightsUnavailable
from flux_ray.wire import (
    Description,
    answer_from,
    description_from,
    pack_call,
    pack_recall,
    pack_request,
)

REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 64, num_steps=1, guidance=1.0, seed=5)
RESULT = ImageResult("a", "tiny", (GeneratedImage(b"png", 5),), StageTimes(0, 0, 0, 0))
DESCRIPTION = Description(PROTOCOL, "r1", "as it is", {"tier": "tiny"}, "cpu", 1.0)


class FakeLoop:
    """Draws at once."""

    def __init__(self) -> None:
        self.generated: list[ImageRequest] = []

    async def stream(self, request: ImageRequest) -> EventStream:
        self.generated.append(request)
        yield Progress(1, 1)
        yield RESULT


class FakeMeter:
    """Counts nothing."""

    def look_up(self, request: ImageRequest, *, is_cached: bool) -> None:
        pass

    @contextmanager
    def count(self, request: ImageRequest) -> Any:
        yield


@pytest.fixture
def leader() -> Any:
    leader: Any = Leader.__new__(Leader)
    leader._loop, leader._meter, leader._description = FakeLoop(), FakeMeter(), DESCRIPTION
    leader._runs = RunningRequests(1000, 60.0)
    return leader


async def said(leader: Any, call: Any, *, is_followed: bool) -> list[Any]:
    if not is_followed:
        return [await leader.generate(call)]
    return [each async for each in leader.follow(call)]


@pytest.mark.parametrize("is_followed", [False, True])
async def test_a_result_says_how_its_replica_is_laid_out(leader: Any, is_followed: bool) -> None:
    *news, last = await said(leader, pack_request(REQUEST), is_followed=is_followed)
    assert [answer_from(each) for each in news] == [Progress(1, 1)] * is_followed
    result = answer_from(last)
    assert isinstance(result, ImageResult)
    assert (result.images, result.layout) == (RESULT.images, DESCRIPTION.layout)
    assert leader._loop.generated == [REQUEST]


@pytest.mark.parametrize("is_followed", [False, True])
async def test_what_it_does_not_know_of_a_request_is_refused(
    leader: Any, is_followed: bool
) -> None:
    call = pack_request(REQUEST) | {"protocol": PROTOCOL + 1}
    call["request"] |= {"sharpness": 1.0}
    with pytest.raises(ProtocolMismatch, match="sharpness"):
        await said(leader, call, is_followed=is_followed)
    assert leader._loop.generated == []


async def test_it_tells_of_itself(leader: Any) -> None:
    assert description_from(await leader.describe(pack_call("tiny", "x"))) == DESCRIPTION


@pytest.mark.parametrize("is_followed", [False, True])
async def test_what_comes_again_is_not_generated_again(leader: Any, is_followed: bool) -> None:
    """By the name of its run only: what has none, or another, is another request."""
    first = await said(leader, pack_request(REQUEST, "mine"), is_followed=is_followed)
    again = await said(leader, pack_recall("tiny", "b", "mine"), is_followed=is_followed)
    assert again == first[-1:]
    with pytest.raises(NotKept):
        await said(leader, pack_recall("tiny", "b", "theirs"), is_followed=is_followed)
    assert len(leader._loop.generated) == 1
    await said(leader, pack_request(REQUEST), is_followed=is_followed)
    assert len(leader._loop.generated) == 2


async def load(args: TierArgs) -> None:
    """Load a leader as Serve does, which needs no Serve before its ranks start."""
    await Leader.__init__(Leader.__new__(Leader), args)


async def test_without_its_weights_a_leader_starts_no_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "start_ranks", lambda *_: pytest.fail("started"))
    with pytest.raises(WeightsUnavailable, match=r"^tier flux-2-dev: this machine has no folder"):
        await load(TierArgs(tier="flux-2-dev", weights="/no/such/folder"))


async def test_a_download_counts_as_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()
    monkeypatch.setattr(module, "prepare_weights", lambda *_: is_over.wait())
    args = TierArgs(tier="flux-2-dev", weights="owner/name@branch", load_timeout_s=0.05)
    expected = r"^tier flux-2-dev did not download owner/name@branch within load_timeout_s 0\.05: "
    try:
        with pytest.raises(TimeoutError, match=expected):
            await load(args)
    finally:
        is_over.set()


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_a_warm_up_has_what_the_tier_cannot_work_without(tier: Tier) -> None:
    asked = warm_up_request(tier)
    assert asked.num_forwards == tier.num_forwards
    assert (asked.mask is not None) == tier.requires_mask
    assert asked.follows_reference == tier.takes_control
    needs_image = tier.requires_mask or tier.takes_control
    assert asked.reference_sizes == ((tier.default_side, tier.default_side),) * needs_image
    assert all(len(each.rgb) == 3 * each.width * each.height for each in asked.references)
