"""What prices learn: they converge, ignore nonsense, follow changes, stay small, and are shared."""

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from flux_ray.errors import TierUnavailable
from flux_ray.request import ImageRequest, RgbImage, StageTimes
from flux_ray.router.pricing.cost import ReplicaSpec, RequestShape, price
from flux_ray.router.pricing.cost_model import (
    NUM_BUCKETS,
    WINDOW,
    Calibration,
    CalibrationRow,
    CostModel,
    Observation,
    bucket_of,
    merged,
)

LAYOUT = ReplicaSpec("h100-80gb", tensor=2)
LAYOUTS = {"flux-2-dev": LAYOUT, "flux-2-klein-4b": ReplicaSpec("h100-80gb")}
WORK = RequestShape("flux-2-dev", 1024, 1024, num_steps=28)
KLEIN = RequestShape("flux-2-klein-4b", 1024, 1024, num_steps=4)


class Clock:
    """A second later every time it is looked at."""

    def __init__(self, now_s: float = 1.7e9) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def model(clock: Callable[[], float] | None = None) -> CostModel:
    return CostModel(LAYOUTS, clock or Clock())


def times(work: RequestShape, ratio: float) -> StageTimes:
    """As if every stage took `ratio` times what the roofline says."""
    prior = price(work, LAYOUTS[work.tier])
    return StageTimes(3.0, *(ratio * s for s in (prior.encode_s, prior.denoise_s, prior.decode_s)))


def ratio(learned: CostModel, work: RequestShape) -> float:
    """Of the price to the roofline's."""
    return learned.price_work(work).total_s / price(work, LAYOUTS[work.tier]).total_s


def teach(learned: CostModel, work: RequestShape, value: float, number: int = 1) -> None:
    for _ in range(number):
        learned.learn_work(work, times(work, value))


def test_before_anything_was_measured_the_price_is_the_rooflines() -> None:
    assert model().price_work(WORK) == price(WORK, LAYOUT)


def test_prices_come_to_what_is_measured() -> None:
    learned, dice = model(), random.Random(0)
    for _ in range(40):
        teach(learned, WORK, 1.8 * math.exp(dice.gauss(0, 0.05)))
    assert ratio(learned, WORK) == pytest.approx(1.8, rel=0.05)


def test_stages_are_learned_apart() -> None:
    learned, prior = model(), price(WORK, LAYOUT)
    spent = StageTimes(0, prior.encode_s * 5, prior.denoise_s * 0.5, prior.decode_s * 2)
    for _ in range(3):
        learned.learn_work(WORK, spent)
    cost = learned.price_work(WORK)
    assert cost.encode_s == pytest.approx(spent.encode_s)
    assert cost.denoise_s == pytest.approx(spent.denoise_s)
    assert cost.decode_s == pytest.approx(spent.decode_s)


def test_the_first_request_of_a_cold_start_is_not_believed() -> None:
    learned = model()
    teach(learned, WORK, 30.0)
    assert ratio(learned, WORK) == 1.0
    teach(learned, WORK, 1.5, number=2)
    assert ratio(learned, WORK) == pytest.approx(1.5)


def test_one_in_ten_wildly_wrong_does_not_move_it() -> None:
    learned, dice = model(), random.Random(1)
    prices = []
    for number in range(300):
        wild = 10 ** dice.uniform(-3, 4) if dice.random() < 0.1 else 1.0
        teach(learned, WORK, 1.4 * wild * math.exp(dice.gauss(0, 0.03)))
        if number > WINDOW:
            prices.append(ratio(learned, WORK))
    assert min(prices) > 1.4 * 0.95
    assert max(prices) < 1.4 * 1.05


def test_a_card_twice_as_slow_is_noticed_within_a_dozen_requests() -> None:
    learned, dice = model(), random.Random(2)
    for slowdown, number in ((1.0, 50), (2.0, 12)):
        for _ in range(number):
            teach(learned, WORK, slowdown * math.exp(dice.gauss(0, 0.05)))
    assert ratio(learned, WORK) == pytest.approx(2.0, rel=0.1)


def test_three_slow_requests_are_no_change_yet() -> None:
    learned = model()
    teach(learned, WORK, 1.0, number=20)
    teach(learned, WORK, 2.0, number=3)
    assert ratio(learned, WORK) == pytest.approx(1.0)


def test_what_is_learned_is_of_one_step_and_one_image() -> None:
    learned = model()
    teach(learned, replace(WORK, num_steps=50, num_images=4, num_previews=3), 1.7, number=3)
    one = learned.price_work(replace(WORK, num_steps=1))
    assert one.denoise_s == pytest.approx(1.7 * price(WORK, LAYOUT).denoise_s / 28)
    assert one.decode_s == pytest.approx(1.7 * price(WORK, LAYOUT).decode_s)


def test_a_size_never_seen_goes_by_the_nearest_that_was() -> None:
    learned = model()
    teach(learned, replace(WORK, width=512, height=512), 3.0, number=3)
    teach(learned, replace(WORK, width=2048, height=2048), 1.2, number=3)
    denoise = {
        side: learned.price_work(replace(WORK, width=side, height=side)).denoise_s
        / price(replace(WORK, width=side, height=side), LAYOUT).denoise_s
        for side in (256, 512, 640, 1792, 2048)
    }
    assert denoise == pytest.approx({256: 3.0, 512: 3.0, 640: 3.0, 1792: 1.2, 2048: 1.2})


def test_few_requests_of_many_sizes_count_together() -> None:
    learned = model()
    for side in (512, 1024, 2048):
        teach(learned, replace(WORK, width=side, height=side), 1.6)
    assert ratio(learned, replace(WORK, width=1536, height=1536)) == pytest.approx(1.6)


def test_tiers_are_learned_apart() -> None:
    learned = model()
    teach(learned, WORK, 2.0, number=5)
    assert ratio(learned, KLEIN) == 1.0


def test_requests_are_taken_as_they_are() -> None:
    learned = model()
    asked = ImageRequest("id", "flux-2-klein-4b", "a ring", 512, 512, 4, 1.0, seed=7)
    with_one = replace(asked, references=(RgbImage(512, 512, b""),))
    assert learned.price(with_one).denoise_s > learned.price(asked).denoise_s
    for _ in range(3):
        learned.learn(asked, StageTimes(9.0, 0.1, 4.0, 0.3))
    assert learned.price(asked).denoise_s == pytest.approx(4.0)
    assert learned.price(asked).total_s == pytest.approx(4.4)


def test_a_second_of_two_cards_is_two_gpu_seconds() -> None:
    assert model().on_all_cards("flux-2-dev", 1.5) == 3.0


def test_the_error_is_that_of_the_price_before() -> None:
    learned = model()
    first = learned.learn_work(WORK, times(WORK, 2.0))
    assert [seen.error for seen in first] == pytest.approx([math.log(2)] * 3)
    teach(learned, WORK, 2.0, number=2)
    assert [seen.error for seen in learned.learn_work(WORK, times(WORK, 2.0))] == pytest.approx(
        [0.0] * 3, abs=1e-9
    )
    # Twice too little is as wrong as twice too much.
    assert [seen.error for seen in learned.learn_work(WORK, times(WORK, 1.0))] == pytest.approx(
        [math.log(2)] * 3
    )


def test_observations_say_of_what_they_are() -> None:
    """The seconds are of one prompt, one step, one image."""
    work = replace(WORK, references=(1024 * 1024,), num_images=3)
    seen = model().learn_work(work, times(work, 1.0))
    once = price(replace(work, num_steps=1, num_images=1), LAYOUT)
    one_round = (price(work, LAYOUT).encode_s, once.denoise_s, once.decode_s)
    for kind in ("prior_s", "predicted_s", "measured_s"):
        assert [getattr(one, kind) for one in seen] == pytest.approx(one_round)
    assert [(one.tier, one.stage, one.size) for one in seen] == [
        ("flux-2-dev", "encode", 1024 * 1024),
        ("flux-2-dev", "denoise", 512 + 4096 + 4096),
        ("flux-2-dev", "decode", 1024 * 1024),
    ]


@pytest.mark.parametrize("nonsense", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_teaches_nothing(nonsense: float) -> None:
    learned = model()
    for _ in range(5):
        seen = learned.learn_work(WORK, StageTimes(0.0, nonsense, nonsense, nonsense))
        assert seen == ()
    assert learned.snapshot() == ()
    assert ratio(learned, WORK) == 1.0


def test_adversarial_sizes_do_not_make_it_grow() -> None:
    learned, dice = Calibration(), random.Random(3)
    for second in range(20_000):
        size = int(2 ** dice.uniform(0, 200))
        learned.add(Observation("tiny", "denoise", size, 1.0, 1.0, 1.0), float(second))
    assert len(learned.windows) <= NUM_BUCKETS
    assert {len(window) for window in learned.windows.values()} == {WINDOW}


@pytest.mark.parametrize("size", [0, 1, 2, 64, 4608, 10**6, 10**30, sys.maxsize])
def test_every_size_has_a_bucket(size: int) -> None:
    assert 0 <= bucket_of(size) < NUM_BUCKETS


def test_buckets_are_half_an_octave() -> None:
    assert bucket_of(4096) == bucket_of(4608) == bucket_of(8192) - 2


def test_a_restarted_gateway_knows_what_the_last_one_did() -> None:
    before, after = model(), model()
    teach(before, WORK, 1.9, number=30)
    teach(before, KLEIN, 0.6, number=2)
    # The ledger keeps it as JSON or as it is.
    after.restore(json.loads(json.dumps(before.snapshot())))
    assert after.price_work(WORK) == before.price_work(WORK)
    assert after.snapshot() == before.snapshot()
    teach(after, KLEIN, 0.6)
    assert ratio(after, KLEIN) == pytest.approx(0.6)


def test_restoring_adds_to_what_is_known() -> None:
    mine, others = model(), model()
    teach(mine, KLEIN, 0.5, number=3)
    teach(others, WORK, 1.5, number=3)
    mine.restore(others.snapshot())
    assert ratio(mine, KLEIN) == pytest.approx(0.5)
    assert ratio(mine, WORK) == pytest.approx(1.5)


def test_two_gateways_merge_into_the_same_whatever_the_order_and_how_often() -> None:
    clock = Clock()
    first, second = model(clock), model(clock)
    for _ in range(20):
        teach(first, WORK, 1.2)
        teach(second, WORK, 1.3)
        teach(second, KLEIN, 0.7)
    a, b = first.snapshot(), second.snapshot()
    both = merged(a, b)
    assert both == merged(b, a) == merged(both, a, b, both) == merged(merged(b), merged(a, a))
    first.restore(both)
    second.restore(both)
    assert first.snapshot() == second.snapshot() == both
    # The newest of both gateways, which took turns.
    seen = [ratio.value for row in both if row.tier == WORK.tier for ratio in row.ratios]
    assert {round(value, 6) for value in seen} == {1.2, 1.3}
    assert ratio(first, KLEIN) == pytest.approx(0.7)


def test_a_gateway_hears_of_a_slow_card_from_another() -> None:
    clock = Clock()
    first, second = model(clock), model(clock)
    teach(first, WORK, 1.0, number=20)
    second.restore(first.snapshot())
    teach(second, WORK, 2.0, number=10)
    first.restore(second.snapshot())
    assert ratio(first, WORK) == pytest.approx(2.0)


def test_a_gateway_whose_clock_is_ahead_does_not_silence_the_others() -> None:
    ahead, behind = model(Clock(2e9)), model(Clock(1e9))
    teach(ahead, WORK, 1.0, number=20)
    behind.restore(ahead.snapshot())
    teach(behind, WORK, 2.0, number=10)
    assert ratio(behind, WORK) == pytest.approx(2.0)


def test_another_layout_starts_anew() -> None:
    before = model()
    teach(before, WORK, 3.0, number=5)
    teach(before, KLEIN, 3.0, number=5)
    after = CostModel(LAYOUTS | {"flux-2-dev": replace(LAYOUT, quantization="fp8")}, Clock())
    after.restore(before.snapshot())
    assert {row.tier for row in after.snapshot()} == {"flux-2-klein-4b"}


def test_rows_that_cannot_be_are_left_out() -> None:
    layout, good = repr(LAYOUT), ((1.0, 2.0),)
    learned = model()
    learned.restore(
        [
            CalibrationRow("flux-3", layout, "denoise", 20, good),
            CalibrationRow("flux-2-dev", layout, "upscale", 20, good),
            CalibrationRow("flux-2-dev", layout, "denoise", NUM_BUCKETS, good),
            CalibrationRow("flux-2-dev", layout, "denoise", 20, ((1.0, math.nan), (2.0, -1.0))),
        ]
    )
    assert [row for row in learned.snapshot() if row.ratios] == []


def test_a_tier_that_is_not_served_has_no_price() -> None:
    with pytest.raises(TierUnavailable, match="flux-2-pro is not served here"):
        model().price_work(replace(WORK, tier="flux-2-pro"))
