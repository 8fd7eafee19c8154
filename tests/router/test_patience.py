"""Patience: it falls while long work is served better than short, and comes back."""

import math

import pytest

from flux_ray.router.patience import ENOUGH, LARGEST, SMALLEST, Patience


def decided(short: bool, long: bool, num: int, patience: Patience) -> float:
    for _ in range(num):
        patience.decide(1.0, is_served=short)
        patience.decide(5.0, is_served=long)
    return patience.factor


def test_it_is_a_multiple_of_the_mean_slack() -> None:
    patience = Patience()
    for slack_s in (1.0, 2.0, 3.0):
        assert patience.limit_s == math.inf
        for _ in range(ENOUGH // 3):
            patience.see(slack_s)
    assert patience.limit_s == pytest.approx(2.0 * patience.factor)


def test_it_falls_while_the_long_are_favoured() -> None:
    patience = Patience()
    before = patience.factor
    assert decided(short=False, long=True, num=50, patience=patience) < before
    assert decided(short=False, long=True, num=5000, patience=patience) == SMALLEST


def test_it_rises_while_the_short_are() -> None:
    patience = Patience()
    decided(short=False, long=True, num=5000, patience=patience)
    assert decided(short=True, long=False, num=5000, patience=patience) == LARGEST


def test_it_stays_out_of_the_way_while_all_are_served() -> None:
    patience = Patience()
    before = patience.factor
    assert decided(short=True, long=True, num=50, patience=patience) >= before


def test_work_for_nothing_does_no_harm() -> None:
    patience = Patience()
    for _ in range(ENOUGH):
        patience.see(-1.0)
    patience.decide(0.0, is_served=False)
    assert patience.limit_s == 0.0
