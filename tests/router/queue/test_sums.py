"""The sorted list with sums: against a plain list, and exactly zero when it is empty."""

import random

import pytest

from flux_ray.router.queue.sums import SortedSums


def filled(dice: random.Random, num: int) -> tuple[SortedSums[int], dict[tuple[float, int], float]]:
    sums: SortedSums[int] = SortedSums()
    amounts = {}
    for number in range(num):
        key = (dice.choice((dice.random(), 0.5)), number)
        amounts[key] = dice.random()
        sums.add(key, amounts[key], number)
    return sums, amounts


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_a_plain_list(seed: int) -> None:
    dice = random.Random(seed)
    sums, amounts = filled(dice, 1000)
    for key in dice.sample(sorted(amounts), 400):
        assert sums.remove(key) == key[1]
        del amounts[key]
    keys = sorted(amounts)
    assert list(sums) == [number for _, number in keys]
    assert len(sums) == len(keys)
    assert sums.total == pytest.approx(sum(amounts.values()))
    for at in (-1.0, 0.25, 0.5, 0.75, 2.0):
        before = [key for key in keys if key < (at, 500)]
        number, total = sums.before((at, 500))
        assert number == len(before)
        assert total == pytest.approx(sum(amounts[key] for key in before))
        largest = max(before, key=lambda key: amounts[key], default=None)
        found = sums.largest_until((at, 500))
        if (at, 500) not in amounts:
            assert found == (None if largest is None else largest[1])


def test_of_equal_amounts_the_last_is_the_largest() -> None:
    sums: SortedSums[int] = SortedSums()
    for number in range(1000):
        sums.add((float(number), 0), 1.0, number)
    assert sums.largest_until((700.5, 0)) == 700


def test_empty_means_zero() -> None:
    dice = random.Random(1)
    sums, amounts = filled(dice, 500)
    for key in dice.sample(sorted(amounts), len(amounts)):
        sums.remove(key)
    assert (sums.total, len(sums), sums.first()) == (0.0, 0, None)
    assert sums.before((9.0, 0)) == (0, 0.0)


def test_what_is_not_there_cannot_be_removed() -> None:
    sums: SortedSums[int] = SortedSums()
    with pytest.raises(KeyError):
        sums.remove((1.0, 1))
    sums.add((1.0, 1), 1.0, 7)
    for key in ((0.5, 1), (1.0, 2)):
        with pytest.raises(KeyError):
            sums.remove(key)
