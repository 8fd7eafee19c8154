"""How wrong estimates are: no hope while they are exact, more of it the more they err."""

import math
import random

import pytest

from flux_ray.router.queue.admission import HOPED_DEVIATIONS, LEAST_SHARE, EstimateError


def noted(*ratios: float) -> float:
    spread = EstimateError()
    for ratio in ratios:
        spread.note(ratio * 3.0, 3.0)
    return spread.least_share


def test_nothing_is_hoped_for_while_nothing_is_known_or_all_is_exact() -> None:
    assert noted() == noted(0.5) == 1.0
    assert noted(*[1.0] * 50) == pytest.approx(1.0, abs=1e-6)
    assert noted(*[1.5] * 500) == 1.0


def test_the_more_estimates_err_the_less_a_request_may_take() -> None:
    dice = random.Random(0)
    share = noted(*(dice.lognormvariate(0.0, 0.3) for _ in range(2000)))
    assert share == pytest.approx(math.exp(-0.3 * HOPED_DEVIATIONS), abs=0.05)


def test_hope_has_a_floor_and_nonsense_is_ignored() -> None:
    assert noted(*[0.01, 100.0] * 100) == LEAST_SHARE
    assert noted(0.0, -1.0) == 1.0
