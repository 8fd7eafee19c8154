"""A tier's replicas are asked when they come up, and prices follow the newest of them."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.errors import ReplicaFailed
from flux_ray.request import PROTOCOL, ImageRequest, StageTimes
from flux_ray.router import dispatch as module
from flux_ray.router.dispatch import Descriptions, learn_layouts
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.wire import Description

TIER = "flux-2-dev"
OLD = TierArgs(tier=TIER, weights="w", parallel=Parallel(tensor=2))
NEW = TierArgs(tier=TIER, weights="w", parallel=Parallel(tensor=4), cache_bytes=0)
REQUEST = ImageRequest("a", TIER, "a ring", 1024, 1024, num_steps=28, guidance=4.0, seed=5)
TIMES = StageTimes(0.0, 1.0, 60.0, 3.0)


def description(
    replica: str, args: TierArgs, started_at_s: float, card: str | None = None
) -> Description:
    fields = args.model_dump(mode="json")
    layout = f"{args.parallel.tensor} {card}"
    return Description(PROTOCOL, replica, layout, fields, card, started_at_s)


class Tier:
    """Replicas that say what they are, once their event is set; those in `ill` fail once."""

    def __init__(self, *described: Description) -> None:
        self.described = {each.replica: each for each in described}
        self.asked: list[str] = []
        self.ill: set[str] = set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def ask(self, tier: str, replica: str) -> Description:
        self.asked.append(replica)
        await self.may_answer.wait()
        if replica in self.ill:
            self.ill.discard(replica)
            raise ReplicaFailed("not yet")
        return self.described[replica]


def prices_on(card: str = "h100-80gb") -> CostModel:
    return CostModel({TIER: ReplicaSpec(card), "flux-2-klein-4b": ReplicaSpec(card)})


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def tier() -> Tier:
    return Tier(description("old", OLD, 1.0), description("new", NEW, 2.0))


async def test_a_tier_that_is_redeployed_with_another_layout_is_priced_by_it(tier: Tier) -> None:
    prices = prices_on()
    known = Descriptions(tier.ask, learn_layouts(prices, "h100-80gb", {}))
    known.see(TIER, ("old",))
    await settled()
    before = prices.price(REQUEST)
    assert (prices.on_all_cards(TIER, 1.0), prices.encode_parts_s(REQUEST)[0] > 0) == (2, True)
    known.see(TIER, ("new",))
    await settled()
    assert prices.layouts[TIER] == ReplicaSpec.of(NEW, "h100-80gb")
    assert prices.on_all_cards(TIER, 1.0) == 4
    assert prices.price(REQUEST).denoise_s < before.denoise_s
    assert prices.encode_parts_s(REQUEST) == (0, 0), "the new ones remember nothing"


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
async def test_while_both_are_up_the_newest_counts(tier: Tier, order: tuple[str, ...]) -> None:
    """Whichever is heard first, and in every gateway."""
    prices = prices_on()
    known = Descriptions(tier.ask, learn_layouts(prices, "h100-80gb", {}))
    known.see(TIER, order[:1])
    await settled()
    known.see(TIER, tuple(sorted(order)))
    await settled()
    assert prices.on_all_cards(TIER, 1.0) == 4
    known.see(TIER, ("old",))
    assert prices.on_all_cards(TIER, 1.0) == 2, "the new ones were taken back"
    known.see(TIER, ())
    assert prices.on_all_cards(TIER, 1.0) == 2, "it was scaled to nothing"


async def test_replicas_are_asked_once_while_they_stay(tier: Tier) -> None:
    known = Descriptions(tier.ask)
    for up in (("old",), ("old",), ("new", "old"), ("new", "old"), ("new",)):
        known.see(TIER, up)
        await settled()
    assert tier.asked == ["old", "new"]
    assert known.of(TIER) == {"new": tier.described["new"]}
    assert known.of("tiny") == {}


async def test_one_that_does_not_answer_is_asked_again(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.0)
    tier.ill = {"new"}
    known = Descriptions(tier.ask)
    known.see(TIER, ("new", "old"))
    await settled()
    assert sorted(tier.asked) == ["new", "new", "old"]
    assert known.of(TIER) == tier.described


async def test_a_mistake_of_ours_ends_no_asking(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, serve_log: pytest.LogCaptureFixture
) -> None:
    """Neither one in the answer, nor one in what is learned of it."""
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.0)
    failures: list[Exception] = [KeyError("layout"), ValueError("a mistake")]
    told: list[tuple[Description, ...]] = []

    async def ask(name: str, replica: str) -> Description:
        if len(failures) == 2:
            raise failures.pop()
        return await tier.ask(name, replica)

    def learn(name: str, descriptions: tuple[Description, ...]) -> None:
        if failures:
            raise failures.pop()
        told.append(descriptions)

    known = Descriptions(ask, learn)
    known.see(TIER, ("new",))
    await settled()
    assert told == [(tier.described["new"],)]
    assert serve_log.text.count("replica new of flux-2-dev is asked again") == 2
    assert not known._asking


async def test_the_answer_of_another_replica_is_not_taken_for_its_own(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.0)
    right, tier.described["old"] = tier.described["old"], tier.described["new"]
    known = Descriptions(tier.ask)
    known.see(TIER, ("old",))
    await settled()
    assert known.of(TIER) == {}
    tier.described["old"] = right
    await settled()
    assert known.of(TIER) == {"old": right}


async def test_one_that_goes_before_it_answers_is_forgotten(tier: Tier) -> None:
    tier.may_answer.clear()
    known = Descriptions(tier.ask)
    known.see(TIER, ("old",))
    await settled()
    known.see(TIER, ("new",))
    tier.may_answer.set()
    await settled()
    assert known.of(TIER) == {"new": tier.described["new"]}
    assert not known._asking


def test_each_tier_is_priced_by_its_own_card() -> None:
    """Of one gateway, whose `card` is neither."""
    klein = "flux-2-klein-4b"
    prices = prices_on("a100-40gb")
    learn = learn_layouts(prices, "a100-40gb", {})
    args = TierArgs(tier=klein, weights="w")
    learn(klein, (replace(description("k", args, 1.0, "l40s-48gb")),))
    learn(TIER, (description("d", OLD, 1.0, "h100-80gb"),))
    alone = CostModel({klein: ReplicaSpec("l40s-48gb"), TIER: ReplicaSpec("h100-80gb", tensor=2)})
    asked = replace(REQUEST, tier=klein, num_steps=4)
    assert prices.price(asked) == alone.price(asked)
    assert prices.price(REQUEST) == alone.price(REQUEST)


@pytest.mark.parametrize("card", [None, "h300-1tb"])
def test_the_card_of_the_gateway_stands_in_for_one_that_is_not_known(card: str | None) -> None:
    prices = prices_on("l40s-48gb")
    learn_layouts(prices, "l40s-48gb", {})(TIER, (description("d", OLD, 1.0, card),))
    assert prices.layouts[TIER].card == "l40s-48gb"


def test_a_layout_of_a_newer_version_is_understood_as_far_as_it_goes() -> None:
    prices = prices_on()
    learn = learn_layouts(prices, "h100-80gb", {})
    newer: dict[str, Any] = NEW.model_dump(mode="json") | {"batch": 4}
    newer["parallel"] |= {"expert": 1}
    learn(TIER, (replace(description("n", NEW, 1.0), args=newer),))
    assert prices.on_all_cards(TIER, 1.0) == 4
    learn(TIER, (replace(description("n", NEW, 1.0), args=newer | {"quantization": "int2"}),))
    assert prices.on_all_cards(TIER, 1.0) == 4


def test_what_one_layout_took_says_nothing_of_another() -> None:
    """While both are up, results of either come in."""
    prices = prices_on()
    learn = learn_layouts(prices, "h100-80gb", {})
    old, new = description("old", OLD, 1.0), description("new", NEW, 2.0)
    learn(TIER, (old,))
    for _ in range(5):
        prices.learn(REQUEST, TIMES, old.layout)
    assert prices.price(REQUEST).denoise_s == pytest.approx(60.0)
    learn(TIER, (old, new))
    unmeasured = CostModel({TIER: prices.layouts[TIER]}).price(REQUEST)
    assert prices.price(REQUEST) == unmeasured, "nothing of it is carried over"
    for _ in range(5):
        prices.learn(REQUEST, TIMES, old.layout)
        assert prices.learn(REQUEST, TIMES, "of a replica that nobody asked") == ()
    assert prices.price(REQUEST) == unmeasured, "nor what old replicas still draw"
    assert prices.on_all_cards(TIER, 1.0, old.layout) == 2, "they are paid for as they are"
    for _ in range(5):
        prices.learn(REQUEST, replace(TIMES, denoise_s=20.0), new.layout)
    assert prices.price(REQUEST).denoise_s == pytest.approx(20.0)
    shared = prices_on()
    learn_layouts(shared, "h100-80gb", {})(TIER, (new,))
    shared.restore(prices.snapshot())
    assert shared.price(REQUEST) == prices.price(REQUEST), "in other gateways too"
