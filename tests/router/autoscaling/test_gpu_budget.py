"""GPUs that do not suffice for all: minimum, priority, proportion, and whole groups only."""

import pytest

from flux_ray.router.autoscaling.gpu_budget import Want, check_budget, share_gpus

DEV = Want("flux-2-dev", 8, num_gpus_per_replica=2, min_replicas=1, priority=1)
KLEIN = Want("flux-2-klein-4b", 16, num_gpus_per_replica=1, min_replicas=2)


def test_there_is_enough():
    assert share_gpus([DEV, KLEIN], 32) == {"flux-2-dev": 8, "flux-2-klein-4b": 16}


@pytest.mark.parametrize(
    ("budget", "dev", "klein"),
    [(31, 8, 15), (18, 8, 2), (17, 7, 3), (5, 1, 3), (4, 1, 2), (3, 1, 1), (2, 1, 0), (1, 0, 1)],
)
def test_minimum_first_then_priority(budget, dev, klein):
    assert share_gpus([KLEIN, DEV], budget) == {"flux-2-dev": dev, "flux-2-klein-4b": klein}


def test_equals_share_in_proportion():
    wants = [Want("a", 30), Want("b", 10)]
    assert share_gpus(wants, 20) == {"a": 15, "b": 5}


def test_what_is_too_little_for_a_group_goes_to_a_smaller_one():
    wants = [Want("large", 4, num_gpus_per_replica=8, priority=5), Want("small", 9)]
    assert share_gpus(wants, 30) == {"large": 3, "small": 6}


def test_a_budget_below_one_group():
    assert share_gpus([Want("large", 4, num_gpus_per_replica=8, min_replicas=1)], 7) == {"large": 0}
    with pytest.raises(ValueError, match="gpu_budget 7 is below one replica of large"):
        check_budget([Want("large", 4, num_gpus_per_replica=8)], 7)


def test_a_budget_below_all_the_minima():
    with pytest.raises(ValueError, match="below the min_replicas of all: 4 GPUs"):
        check_budget([DEV, KLEIN], 3)
    check_budget([DEV, KLEIN], 4)


def test_replicas_on_processors_take_none():
    assert share_gpus([Want("tiny", 3, num_gpus_per_replica=0), Want("a", 9)], 2) == {
        "tiny": 3,
        "a": 2,
    }


@pytest.mark.parametrize("budget", range(40))
def test_never_more_than_there_is_and_none_idle_that_fits(budget):
    wants = [
        Want("a", 5, 2, 1),
        Want("b", 3, 4, 0, 2),
        Want("c", 7, 1, 2, 2),
        Want("d", 2, 8, 1, 1),
    ]
    granted = share_gpus(wants, budget)
    used = sum(granted[want.tier] * want.num_gpus_per_replica for want in wants)
    assert used <= budget
    unmet = [want for want in wants if granted[want.tier] < want.replicas]
    assert all(want.num_gpus_per_replica > budget - used for want in unmet)
