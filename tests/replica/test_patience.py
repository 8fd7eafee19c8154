"""How long is waited for a call."""

import math

import pytest

from flux_ray.replica.watchdog import NUM_REMEMBERED, StepWatchdog

MEGAPIXEL = 1024 * 1024


@pytest.fixture
def watchdog() -> StepWatchdog:
    return StepWatchdog(floor_s=5, limit_s=60)


def test_what_was_never_seen_gets_the_limit(watchdog: StepWatchdog) -> None:
    watchdog.learn(0.1, "denoise", (MEGAPIXEL, 0))
    assert watchdog.seconds_for("decode", sizes=(MEGAPIXEL, 0)) == 60
    assert watchdog.seconds_for("denoise", sizes=(4 * MEGAPIXEL, 0)) == 60
    assert watchdog.seconds_for("denoise", sizes=(MEGAPIXEL, MEGAPIXEL)) == 60


@pytest.mark.parametrize(("seconds", "expected"), [(0.1, 5), (0.7, 7), (30, 60)])
def test_ten_times_as_long_between_floor_and_limit(
    watchdog: StepWatchdog, seconds: float, expected: float
) -> None:
    watchdog.learn(seconds, "denoise", (MEGAPIXEL, 0))
    assert watchdog.seconds_for("denoise", sizes=(MEGAPIXEL, 0)) == pytest.approx(expected)


def test_sizes_that_are_about_the_same_are_alike(watchdog: StepWatchdog) -> None:
    watchdog.learn(0.7, "denoise", (MEGAPIXEL, 0))
    assert watchdog.seconds_for("denoise", sizes=(MEGAPIXEL + 100_000, 0)) == pytest.approx(7)


def test_the_longest_of_the_last_ones_counts(watchdog: StepWatchdog) -> None:
    for seconds in (3, 0.7, 0.6):
        watchdog.learn(seconds, "encode", (0,))
    assert watchdog.seconds_for("encode", sizes=(0,)) == pytest.approx(30)
    for _ in range(NUM_REMEMBERED - 1):
        watchdog.learn(0.6, "encode", (0,))
    timeout_s = watchdog.seconds_for("encode", sizes=(0,))
    assert timeout_s == pytest.approx(6), "a slow start is forgotten"


def test_calls_that_come_together_have_the_time_of_all(watchdog: StepWatchdog) -> None:
    watchdog.learn(0.7, "denoise")
    watchdog.learn(0.2, "decode")
    assert watchdog.seconds_for("denoise", "denoise", "decode") == pytest.approx(16)
    assert watchdog.seconds_for("denoise", "preview") == 60


def test_the_longest_is_told_and_infinite_where_there_is_none(watchdog: StepWatchdog) -> None:
    for seconds in (0.2, 0.7, 0.1):
        watchdog.learn(seconds, "denoise")
    assert watchdog.longest_s("denoise") == 0.7
    assert watchdog.longest_s("denoise", (MEGAPIXEL,)) == math.inf


def test_little_is_remembered_whatever_is_asked_for(watchdog: StepWatchdog) -> None:
    for pixels in range(1, 100_000, 7):
        watchdog.learn(0.1, "denoise", (pixels, pixels))
        watchdog.seconds_for("decode", sizes=(pixels, 0))
    assert len(watchdog._seconds) < 20
    assert all(len(times) <= NUM_REMEMBERED for times in watchdog._seconds.values())
