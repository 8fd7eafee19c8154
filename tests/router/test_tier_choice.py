"""Which tier a request goes to, by prices and forecasts."""

import pytest

from flux_ray.config.gateway import Alias
from flux_ray.errors import BadRequest
from flux_ray.request import ImageRequest
from flux_ray.router.pricing.cost import Cost
from flux_ray.router.queue.admission import Forecast
from flux_ray.router.quote import Quote
from flux_ray.router.tier_choice import TierCandidate, in_order


def candidate(tier: str, cost_s: float, wait_s: float, **changed) -> TierCandidate:
    request = ImageRequest("id", tier, "a ring", 128, 128, 4, 1.0, seed=7)
    is_refused = changed.pop("is_refused", False)
    gpu_seconds = changed.pop("gpu_seconds", cost_s)
    deadline_s = changed.pop("deadline_s", 10.0)
    quote = Quote(request, Cost(0.0, cost_s, 0.0), gpu_seconds)
    return TierCandidate(quote, deadline_s, Forecast(wait_s, is_refused))


def chosen(candidates: list[TierCandidate], **alias) -> list[str]:
    wanted = Alias(tiers=tuple(each.quote.tier for each in candidates), **alias)
    return [each.quote.tier for each in in_order(candidates, wanted)]


@pytest.mark.parametrize(
    ("dev_wait_s", "klein_wait_s", "best"),
    [(0, 0, "dev"), (5, 0, "dev"), (5.1, 0, "klein"), (60, 0, "klein"), (20, 9.5, "klein")],
)
def test_the_best_that_meets_the_deadline(dev_wait_s, klein_wait_s, best):
    """dev takes 5 s of 10; of a tier without a replica the wait is for one to start."""
    candidates = [candidate("dev", 5, dev_wait_s), candidate("klein", 0.5, klein_wait_s)]
    assert chosen(candidates)[0] == best


def test_where_none_is_in_time_who_is_done_first():
    candidates = [candidate("max", 8, 40), candidate("dev", 5, 30), candidate("klein", 1, 32)]
    assert chosen(candidates) == ["klein", "dev", "max"]


def test_what_would_be_refused_is_not_in_time():
    """Though it began in time, it would make others late."""
    assert chosen([candidate("dev", 5, 1, is_refused=True), candidate("klein", 1, 2)])[0] == "klein"


def test_each_tier_has_its_own_deadline():
    tiers = [candidate("dev", 5, 9, deadline_s=30), candidate("klein", 1, 0, deadline_s=3)]
    assert chosen(tiers)[0] == "dev"


def test_within_a_price_the_best():
    tiers = [
        candidate("max", 5, 0, gpu_seconds=40),
        candidate("dev", 5, 0, gpu_seconds=10),
        candidate("klein", 1, 0),
    ]
    assert chosen(tiers, max_gpu_seconds=12) == ["dev", "klein"]
    with pytest.raises(BadRequest, match=r"takes 1 GPU seconds, and this model has 0\.5") as caught:
        chosen(tiers, max_gpu_seconds=0.5)
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("waits_s", "order"),
    [((3, 0), "9b 4b"), ((3.1, 0), "4b 9b"), ((9, 7), "4b 9b"), ((7, 9), "9b 4b")],
)
def test_what_waits_too_long_spills(waits_s, order):
    tiers = [candidate(name, 1, wait) for name, wait in zip(("9b", "4b"), waits_s, strict=True)]
    assert chosen(tiers, policy="spill", max_wait_s=3) == order.split()


def test_a_cascade_ends_with_its_best():
    assert chosen([candidate("dev", 5, 90), candidate("4b", 1, 0)], policy="cascade") == ["dev"]
