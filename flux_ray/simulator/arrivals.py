"""When requests come: Poisson, bursty, diurnal and burst streams of times, from a seed."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Literal

Pattern = Literal["poisson", "bursty", "diurnal", "burst"]
DAY_S = 86_400.0
# A day's traffic swings by this part of its mean, and by some noise from one slot to the next.
DIURNAL_SWING = 0.6
NOISE_SIGMA = 0.15
NOISE_SLOT_S = 300.0
BURST_FACTOR = 10.0
BURST_S = 120.0
BURSTY_CV = 3.0


def times_for(
    pattern: Pattern, rate_per_s: float, duration_s: float, rng: random.Random
) -> Iterator[float]:
    """Arrivals of one of the patterns, in seconds from 0 until `duration_s`, at that mean rate.

    `burst` has its mean rate outside the burst, which lies in the middle.
    """
    if rate_per_s <= 0:
        return iter(())
    if pattern == "poisson":
        return poisson(rate_per_s, duration_s, rng)
    if pattern == "bursty":
        return bursty(rate_per_s, duration_s, rng)
    if pattern == "diurnal":
        return diurnal(rate_per_s, duration_s, rng)
    return burst(rate_per_s, duration_s, rng)


def poisson(rate_per_s: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    """Callers who know nothing of each other."""
    return bursty(rate_per_s, duration_s, rng, cv=1.0)


def bursty(
    rate_per_s: float, duration_s: float, rng: random.Random, cv: float = BURSTY_CV
) -> Iterator[float]:
    """Gamma gaps whose standard deviation is `cv` times their mean; 1 is Poisson.

    The usual model of bursty inference traffic (BurstGPT, arXiv 2401.17644, fits its gaps by it).
    """
    shape = cv**-2
    scale_s = cv**2 / rate_per_s
    at_s = rng.gammavariate(shape, scale_s)
    while at_s < duration_s:
        yield at_s
        at_s += rng.gammavariate(shape, scale_s)


def burst(
    rate_per_s: float,
    duration_s: float,
    rng: random.Random,
    start_s: float | None = None,
    burst_s: float = BURST_S,
    factor: float = BURST_FACTOR,
) -> Iterator[float]:
    """Poisson, `factor` times as many from `start_s` (half-way, if not said) for `burst_s`."""
    begins_s = (duration_s - burst_s) / 2 if start_s is None else start_s

    def rate_at(at_s: float) -> float:
        return rate_per_s * (factor if begins_s <= at_s < begins_s + burst_s else 1.0)

    return thinned(rate_at, rate_per_s * factor, duration_s, rng)


def diurnal(
    rate_per_s: float, duration_s: float, rng: random.Random, day_s: float = DAY_S
) -> Iterator[float]:
    """A sinusoid over the day, least at its beginning, with log-normal noise every five minutes."""
    factors: list[float] = []
    most = 3.0 * rate_per_s

    def rate_at(at_s: float) -> float:
        # The mean of the noise is 1, so that the mean rate stays.
        while len(factors) <= at_s // NOISE_SLOT_S:
            factors.append(rng.lognormvariate(-(NOISE_SIGMA**2) / 2, NOISE_SIGMA))
        swing = 1 - DIURNAL_SWING * math.cos(2 * math.pi * at_s / day_s)
        return min(most, rate_per_s * swing * factors[-1])

    return thinned(rate_at, most, duration_s, rng)


def thinned(
    rate_at: Callable[[float], float], most_per_s: float, duration_s: float, rng: random.Random
) -> Iterator[float]:
    """Poisson arrivals of a rate that changes, by thinning (Lewis and Shedler, 1979)."""
    at_s = rng.expovariate(most_per_s)
    while at_s < duration_s:
        if rng.random() * most_per_s < rate_at(at_s):
            yield at_s
        at_s += rng.expovariate(most_per_s)
