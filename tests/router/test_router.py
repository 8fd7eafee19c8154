"""Every request has its turn, and one retry when a replica dies; none for anything else."""

import asyncio
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace

import pytest

from flux_ray.config.gateway import Alias
from flux_ray.errors import (
    BadRequest,
    DeadlinePassed,
    KilledForMemory,
    OutOfMemory,
    Overloaded,
    QuotaSpent,
    ReplicaFailed,
    TierUnavailable,
)
from flux_ray.request import ImageRequest
from flux_ray.router.ledger.messages import Place, Retry
from flux_ray.router.ledger.quota_client import Reservation
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.quotas import LimitStatus, QuotaLimits, Use
from flux_ray.router.quote import Caller
from flux_ray.router.router import Router, Terms
from flux_ray.tracing import request_span, traceparent
from tests.conftest import news_of
from tests.spans import by_name, kept_spans

REQUEST = ImageRequest("id", "tiny", "a ring", 128, 128, 4, 1.0, seed=7)


async def test_result_comes_back_from_the_replica_whose_turn_it_was(router, handles, turns):
    result = await router.generate(REQUEST)
    assert [image.seed for image in result.images] == [7]
    assert (handles.requests, handles.replicas) == ([REQUEST], ["replica 1"])
    assert turns.ended == ["tiny-id-1"]


async def test_the_offer_says_price_deadline_and_key(router, turns):
    await router.generate(REQUEST, Caller(key="someone", weight=2.0, deadline_s=2.5))
    (offer,) = turns.submissions
    assert (offer.tier, offer.deadline_in_s) == ("tiny", pytest.approx(2.5, abs=0.5))
    assert (offer.key, offer.weight) == ("someone", 2.0)
    fresh = CostModel({"tiny": ReplicaSpec("cpu", dtype="float32")})
    assert offer.cost_s == pytest.approx(fresh.price(REQUEST).total_s)


async def test_it_is_priced_once(handles, turns, bill, monkeypatch):
    """However many tiers it is for, and however often it is tried."""
    prices = CostModel({tier: ReplicaSpec("cpu") for tier in ("tiny", "tiny-tp2")})
    priced, price, forecast = [], prices.price, turns.forecast

    def count(request):
        priced.append(request.tier)
        return price(request)

    async def look(offers):
        assert [offer.affinity for offer in offers] == [(), ()]
        return await forecast(offers)

    monkeypatch.setattr(prices, "price", count)
    monkeypatch.setattr(turns, "forecast", look)
    router = Router(handles, turns, prices, bill, Terms(5))
    router.quotas = FakeTurnstile()
    handles.failures = [ReplicaFailed("died")]
    await router.generate(REQUEST)
    assert priced == ["tiny"]
    assert all(offer.affinity for offer in turns.submissions)
    alias = Alias(tiers=("tiny-tp2", "tiny"))
    await router.generate_by(alias, [replace(REQUEST, tier=tier) for tier in alias.tiers])
    assert sorted(priced) == ["tiny", "tiny", "tiny-tp2"]


async def test_the_ledger_hears_of_long_requests_and_of_those_that_are_followed(
    router, handles, turns
):
    await router.generate(REQUEST)
    assert turns.left_s == {}, "it is over too soon"
    heard = []
    await router.generate(replace(REQUEST, request_id="heard"), Caller(on_event=heard.append))
    assert heard == news_of(REQUEST)
    # Far more than it is, on a processor.
    await router.generate(replace(REQUEST, request_id="long", num_steps=5000))
    assert [*turns.left_s] == ["tiny-heard-1", "tiny-long-1"]
    handles.failures = [BadRequest("no")]
    with pytest.raises(BadRequest):
        await router.generate(replace(REQUEST, request_id="wrong"))
    assert turns.done == ["tiny-id-1", "tiny-heard-1", "tiny-long-1"]
    assert turns.ended == [*turns.done, "tiny-wrong-1"]


async def test_no_deadline_is_later_than_the_gateway_waits(router, turns):
    await router.generate(REQUEST, Caller(deadline_s=1000))
    await router.generate(REQUEST)
    assert [offer.deadline_in_s for offer in turns.submissions] == pytest.approx([5, 5], abs=0.5)


async def test_what_it_took_corrects_the_price(router, turns):
    """The fakes take 9 ms for what was priced at more."""
    for _ in range(3):
        await router.generate(REQUEST)
    await router.generate(REQUEST)
    assert turns.submissions[-1].cost_s == pytest.approx(0.009)
    assert turns.submissions[0].cost_s != pytest.approx(0.009, rel=0.1)


async def test_prices_and_what_came_of_them_are_counted(router, turns, bill):
    await router.generate(REQUEST)
    turns.refusals = [Overloaded("too late")]
    with pytest.raises(Overloaded):
        await router.generate(REQUEST)
    names = [name for name, _ in bill.entries]
    assert names == ["priced", "measured", "measured", "measured", "refused"]
    assert bill.entries[0][1] == pytest.approx(turns.submissions[0].cost_s)
    assert bill.entries[1:4] == [
        ("measured", pytest.approx(seconds)) for seconds in (0.002, 0.003 / 4, 0.004)
    ]


async def test_seconds_of_waiting_and_of_cards_are_counted(router, handles, turns, bill):
    """A second try waits again, and a refused one waited for nothing."""
    handles.failures = [ReplicaFailed("died")]
    await router.generate(REQUEST)
    turns.refusals = [Overloaded("too late")]
    with pytest.raises(Overloaded):
        await router.generate(REQUEST)
    assert [name for name, _ in bill.spent] == ["waited", "waited", "drawn"]
    assert bill.spent[-1][1] == pytest.approx(0.009)


async def test_a_refusal_reaches_the_caller_and_no_replica(router, handles, turns):
    turns.refusals = [Overloaded("too late", None, 7)]
    with pytest.raises(Overloaded) as caught:
        await router.generate(REQUEST)
    assert caught.value.retry_after_s == 7
    assert handles.requests == []


async def test_a_tier_that_is_not_deployed_is_told_at_once(router, handles, turns, monkeypatch):
    async def refuse(tier):
        raise TierUnavailable(f"{tier} is not deployed", "model")

    monkeypatch.setattr(handles, "connect", refuse)
    with pytest.raises(TierUnavailable, match="tiny is not deployed"):
        await router.generate(REQUEST)
    assert turns.submissions == [], "it would wait for ever"


async def test_a_dead_replica_is_tried_once_more_with_the_same_request(router, handles, turns):
    handles.failures = [ReplicaFailed("died")]
    await router.generate(REQUEST, Caller(deadline_s=0.5))
    assert handles.requests == [REQUEST, REQUEST]
    assert turns.ended == ["tiny-id-1", "tiny-id-2"], "as two turns"
    left_s = turns.submissions[1].deadline_in_s
    assert left_s == pytest.approx(5, abs=0.5), "it is not refused for what was not its fault"


async def test_who_listens_hears_of_a_second_replica_from_the_beginning(router, handles):
    handles.failures = [ReplicaFailed("died")]
    heard = []
    request = replace(REQUEST, num_previews=1)
    await router.generate(request, Caller(on_event=heard.append))
    assert heard == 2 * news_of(request)
    alias = Alias(tiers=("tiny",), max_gpu_seconds=100)
    await router.generate_by(alias, [request], Caller(on_event=heard.append))
    assert heard == 3 * news_of(request)


async def test_a_second_death_reaches_the_caller(router, handles):
    handles.failures = [ReplicaFailed("died"), ReplicaFailed("died again")]
    with pytest.raises(ReplicaFailed, match="died again"):
        await router.generate(REQUEST)
    assert len(handles.requests) == 2


KILLED = KilledForMemory("its node was out of memory")
DIED = ReplicaFailed("died")


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([KILLED], None),
        ([KILLED, DIED], ReplicaFailed),
        ([DIED, KILLED], KilledForMemory),
        ([KILLED, KILLED], OutOfMemory),
    ],
    ids=["a neighbour's fault", "killed, then died", "died, then killed", "its own fault"],
)
async def test_a_request_under_which_two_replicas_are_killed_for_memory_ends_no_third(
    router, handles, failures, expected
):
    """A job with any other error is tried five times, each on two replicas."""
    handles.failures = list(failures)
    if expected is None:
        await router.generate(REQUEST)
    else:
        with pytest.raises(expected) as caught:
            await router.generate(REQUEST)
        assert type(caught.value) is expected
    assert len(handles.requests) == 2


@pytest.mark.parametrize(
    "failure", [TierUnavailable("down"), BadRequest("bad"), RuntimeError(), TimeoutError("theirs")]
)
async def test_other_failures_are_not_tried_again(router, handles, turns, failure):
    handles.failures = [failure]
    with pytest.raises(type(failure)) as caught:
        await router.generate(REQUEST)
    assert caught.value is failure
    assert len(handles.requests) == 1
    assert turns.ended == ["tiny-id-1"]


class SlowHandles:
    """Replicas that never answer."""

    def __init__(self):
        self.was_cancelled = False

    async def connect(self, tier):
        pass

    async def generate(self, request, replica, on_event):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


async def test_the_deadline_cancels_the_attempt(turns, router):
    handles = SlowHandles()
    with pytest.raises(DeadlinePassed, match=r"0\.01 seconds"):
        await Router(handles, turns, router.prices, router.metrics, Terms(0.01)).generate(REQUEST)
    assert handles.was_cancelled
    assert turns.ended == ["tiny-id-1"]


async def test_a_client_that_leaves_cancels_the_attempt(turns, router):
    router.handles = handles = SlowHandles()
    task = asyncio.create_task(router.generate(REQUEST))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handles.was_cancelled
    assert turns.ended == ["tiny-id-1"]


class FakeTurnstile:
    """Lets in no request of the tiers in `spent`."""

    def __init__(self, *spent):
        self.spent = spent
        self.entries = []
        self.stays = []

    @asynccontextmanager
    async def reserved(self, entry, allowance):
        self.entries.append((entry, allowance))
        if entry.tier in self.spent:
            raise QuotaSpent("no more today", None, 1000)
        self.stays.append(Reservation(entry.use, entry.cost_s))
        yield self.stays[-1]

    def standing(self, key):
        return LimitStatus(10, 4, 3.0)

    async def used_today(self, key):
        return Use(7.0, 1.0)


async def test_a_request_is_counted_by_its_price_and_then_by_what_it_took(router, turns):
    router.quotas = FakeTurnstile()
    allowance = QuotaLimits(max_concurrent=3)
    await router.generate(REQUEST, Caller("someone", allowance=allowance))
    ((entry, told),) = router.quotas.entries
    assert (entry.request_id, entry.tier, entry.key, told) == ("id", "tiny", "someone", allowance)
    assert entry.use == Use(turns.submissions[0].cost_s, 128 * 128 / 1e6)
    assert router.quotas.stays[0].use == Use(pytest.approx(0.009), 128 * 128 / 1e6)


async def test_who_has_used_up_one_tier_is_served_by_the_next(router, handles):
    prices = CostModel({tier: ReplicaSpec("cpu") for tier in ("tiny", "tiny-tp2")})
    router = Router(handles, router.queue, prices, router.metrics, Terms(5))
    alias = Alias(tiers=("tiny-tp2", "tiny"))
    requests = [replace(REQUEST, tier=tier) for tier in alias.tiers]
    router.quotas = FakeTurnstile("tiny-tp2")
    assert (await router.generate_by(alias, requests)).tier == "tiny"
    router.quotas = FakeTurnstile("tiny-tp2", "tiny")
    with pytest.raises(QuotaSpent):
        await router.generate_by(alias, requests)


@pytest.mark.parametrize(("timeout_s", "num_tries"), [(5, 2), (0.04, 1)])
async def test_all_tiers_of_an_alias_have_the_time_of_one_request(
    handles, turns, bill, monkeypatch, timeout_s, num_tries
):
    """A refusal may come when most of it is over, and then another tier has only the rest."""
    limits_s = []

    def note(seconds, late):
        limits_s.append(seconds)
        return nullcontext()

    async def refuse(offer, on_event, quota):
        await asyncio.sleep(0.05)
        raise Overloaded("it gave way")

    monkeypatch.setattr("flux_ray.router.router.within", note)
    monkeypatch.setattr(turns, "take", refuse)
    alias = Alias(tiers=("tiny-tp2", "tiny"))
    prices = CostModel({tier: ReplicaSpec("cpu") for tier in alias.tiers})
    router = Router(handles, turns, prices, bill, Terms(timeout_s))
    with pytest.raises(Overloaded):
        await router.generate_by(alias, [replace(REQUEST, tier=tier) for tier in alias.tiers])
    assert len(limits_s) == num_tries
    assert limits_s[-1] <= timeout_s - 0.04 * (num_tries - 1)


@pytest.mark.parametrize(
    ("allowance", "left"),
    [
        ({}, None),
        ({"max_concurrent": 3}, None),
        ({"gpu_seconds_per_day": 10}, 3),
        ({"gpu_seconds_per_day": 5}, 0),
    ],
)
async def test_what_a_key_has_left_today(router, allowance, left):
    router.quotas = FakeTurnstile()
    assert await router.credits(Caller("someone", allowance=QuotaLimits(**allowance))) == left


async def test_only_who_is_limited_stands_somehow(router):
    limited = Caller("someone", allowance=QuotaLimits(requests_per_minute=10))
    assert router.standing(limited) is None, "without a turnstile nobody counts"
    router.quotas = FakeTurnstile()
    assert router.standing(limited) == (10, 4, 3.0)
    assert router.standing(Caller("someone")) is None


async def test_ready_tiers_are_the_handles(router):
    assert await router.ready_tiers() == ("tiny",)


RETRY = Retry("ours", "a ring")


async def test_what_comes_again_is_looked_for_where_it_was_last(router, handles, turns):
    caller = Caller(retry=RETRY)
    result = await router.generate(REQUEST, caller)
    places = await router.places(caller)
    assert [(each.replica, each.seed) for each in places] == [("replica 1", 7)]
    nowhere = places[0]._replace(replica="another"), places[0]._replace(tier="tiny-tp2")
    assert await router.recall((*nowhere, *places), [REQUEST], caller) == result
    assert await router.recall(nowhere, [REQUEST], caller) is None
    assert await router.recall(places, [REQUEST], replace(caller, retry=None)) is None
    assert await router.places(Caller()) == ()
    assert (len(turns.submissions), len(handles.requests)) == (1, 1)


@pytest.mark.parametrize(
    "error", [TierUnavailable("too old"), ReplicaFailed("died"), BadRequest("no")]
)
async def test_what_is_told_of_it_is_an_answer_unless_the_replica_is_lost(
    router, handles, monkeypatch, error
):
    async def fail(request, replica, on_event, run):
        raise error

    monkeypatch.setattr(handles, "recall", fail)
    place = Place("t", "tiny", "replica 1", "a ring", 7)
    recalling = router.recall((place,), [REQUEST], Caller(retry=RETRY))
    if isinstance(error, BadRequest):
        with pytest.raises(BadRequest):
            await recalling
    else:
        assert await recalling is None


async def test_nobody_waits_for_it_longer_than_for_another(router, handles, monkeypatch):
    async def hang(request, replica, on_event, run):
        await asyncio.Event().wait()

    monkeypatch.setattr(handles, "recall", hang)
    router.terms = Terms(0.01)
    place = Place("t", "tiny", "replica 1", "a ring", 7)
    with pytest.raises(DeadlinePassed):
        await router.recall((place,), [REQUEST], Caller(retry=RETRY))


async def test_a_trace_says_what_a_request_costs_and_not_what_it_asks_for(router):
    caller = Caller(key="alice", key_class="paying")
    with kept_spans() as spans, request_span({}, {}):
        await router.generate(replace(REQUEST, prompt="a secret ring"), caller)
    generate = by_name(spans)["generate"]
    assert generate.attributes["flux.gpu_s"] > 0 and generate.attributes["flux.priced_gpu_s"] > 0
    said = {"flux.tier": "tiny", "flux.key": "alice", "flux.key_class": "paying"}
    assert said.items() <= generate.attributes.items()
    assert "secret" not in generate.to_json()


async def test_a_job_is_in_the_trace_of_what_submitted_it(router):
    with kept_spans() as spans:
        with request_span({}, {}):
            submitted = traceparent()
        await router.generate(REQUEST, Caller(is_job=True, traceparent=submitted))
    made = by_name(spans)
    assert made["generate"].parent.span_id == made["request"].context.span_id
