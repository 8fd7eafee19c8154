"""The rate of arriving work, told apart from its noise."""

import random

import pytest

from flux_ray.router.autoscaling.scaler import ArrivalRate


def observe(demand, amounts, start=0):
    for second, amount in enumerate(amounts, start=start):
        demand.observe(amount, float(second))
    return start + len(amounts)


def poisson_requests(rng, rate_per_s, costs):
    """The work of one second after another."""
    while True:
        amount, left = 0.0, 1.0
        while (left := left - rng.expovariate(rate_per_s)) > 0:
            amount += rng.choice(costs)
        yield amount


def test_nothing_was_seen():
    demand = ArrivalRate()
    assert (demand.rate, demand.lump_s) == (0.0, 0.0)
    demand.observe(7.0, 100.0)
    # In how long a time it came, nobody knows.
    assert demand.rate == 0.0


def test_a_steady_stream():
    demand = ArrivalRate()
    observe(demand, [3.0] * 100)
    assert demand.rate == pytest.approx(3.0)
    assert demand.lump_s == 0.0


def test_it_counts_time_and_not_calls():
    demand = ArrivalRate()
    for tick in range(1000):
        demand.observe(0.3, tick / 10)
    assert demand.rate == pytest.approx(3.0, rel=0.02)


def test_the_lump_is_that_of_the_requests():
    """Of a compound Poisson process: the mean square of a request over its mean."""
    demand = ArrivalRate()
    rng = random.Random(3)
    work = poisson_requests(rng, 0.5, (4, 4, 4, 9, 25))
    observe(demand, [next(work) for _ in range(5000)])
    assert demand.lump_s == pytest.approx((3 * 16 + 81 + 625) / 46, rel=0.25)
    assert demand.wave(5.0, 10.0) == pytest.approx((demand.lump_s * 5 / 10) ** 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_it_little(seed):
    demand = ArrivalRate()
    work = poisson_requests(random.Random(seed), 0.5, (4, 4, 4, 9, 25))
    now = observe(demand, [next(work) for _ in range(900)])
    rates = []
    for second in range(now, now + 1800):
        demand.observe(next(work), float(second))
        rates.append(demand.rate)
    assert 0.75 * 4.6 < sum(rates) / len(rates) < 1.25 * 4.6
    # The mean of seven seconds, of which every tenth is above twice the rate.
    assert max(rates) < 2.2 * 4.6


def test_ten_times_as_much_is_seen_in_seconds_and_forgotten_in_seconds():
    demand = ArrivalRate()
    rng = random.Random(4)
    few, many = poisson_requests(rng, 4, (0.5, 1.5)), poisson_requests(rng, 40, (0.5, 1.5))
    now = observe(demand, [next(few) for _ in range(900)])
    assert 3 < demand.rate < 5
    now = observe(demand, [next(many) for _ in range(7)], now)
    assert demand.rate > 20
    now = observe(demand, [next(many) for _ in range(113)], now)
    assert 33 < demand.rate < 47
    now = observe(demand, [next(few) for _ in range(15)], now)
    assert demand.rate < 12
    observe(demand, [next(few) for _ in range(60)], now)
    assert demand.rate < 5.5


def test_memory_is_bounded():
    demand = ArrivalRate()
    observe(demand, [1.0] * 5000)
    assert len(demand._ends) == len(demand._totals) < 2000
