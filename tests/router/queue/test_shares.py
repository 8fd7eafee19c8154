"""Fair shares: who is over, by max-min fairness in GPU seconds."""

import pytest

from flux_ray.router.queue.shares import Shares


def over(num_slots: int, now: float = 0.0, **asked_s: float) -> frozenset[str]:
    """Who is over when each key asks for so many seconds at once; the window is ten seconds."""
    shares = Shares(window_s=10.0)
    for key, seconds in asked_s.items():
        shares.ask(key, 2.0 if key.startswith("heavy") else 1.0, seconds, 0.0)
    shares.review(num_slots, now)
    return shares.over


def test_a_key_alone_is_never_over() -> None:
    assert over(1, a=1000.0) == frozenset()


def test_nobody_is_over_while_there_is_enough() -> None:
    assert over(10, a=60.0, b=30.0) == frozenset()


def test_the_greedy_one_is() -> None:
    assert over(10, a=1000.0, b=30.0) == {"a"}


def test_small_demands_leave_their_rest_to_others() -> None:
    # 100 seconds: b and c take 10 each, so that a may have 80.
    assert over(10, a=85.0, b=10.0, c=10.0) == frozenset()
    assert over(10, a=120.0, b=10.0, c=10.0) == {"a"}


def test_all_may_be_over() -> None:
    assert over(10, a=100.0, b=100.0) == {"a", "b"}


def test_shares_go_by_weight() -> None:
    # 90 seconds for weights 2 and 1.
    assert over(9, heavy=60.0, b=60.0) == {"b"}


def test_demand_fades() -> None:
    assert over(10, now=30.0, a=1000.0, b=100.0) == frozenset()
    assert over(10, now=5.0, a=1000.0, b=30.0) == {"a"}


def test_a_standing_does_not_flip_all_the_time() -> None:
    shares = Shares(window_s=10.0)
    shares.ask("b", 1.0, 50.0, 0.0)
    shares.ask("a", 1.0, 55.0, 0.0)
    assert shares.review(10, 0.0) == frozenset()
    shares.ask("a", 1.0, 10.0, 0.0)
    assert shares.review(10, 0.0) == {"a"}
    shares.ask("b", 1.0, 4.0, 0.0)
    # Both want a little more than half now; a stays where it was, and b too.
    assert shares.review(10, 0.0) == frozenset()
    assert shares.over == {"a"}


def test_old_keys_are_forgotten() -> None:
    shares = Shares(window_s=1.0)
    for number in range(1000):
        shares.ask(f"key {number}", 1.0, 1.0, float(number))
        shares.review(1, float(number))
    assert len(shares._demands) < 10


def test_looking_costs_little() -> None:
    shares = Shares(window_s=100.0)
    assert shares.is_due(0.0)
    shares.review(1, 0.0)
    assert not shares.is_due(0.9)
    assert shares.is_due(1.1)


@pytest.mark.parametrize("num_slots", [0, 1])
def test_without_capacity_all_are_over(num_slots: int) -> None:
    assert over(num_slots, a=1000.0, b=1000.0) == {"a", "b"}
