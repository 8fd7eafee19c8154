"""What becomes of a job whose attempt failed."""

import pytest

from flux_ray import errors
from flux_ray.jobs.attempt import LOST, MAX_PAUSE_S, RetryLater, outcome_of
from flux_ray.jobs.images import ResultMissing, ResultTooLarge
from flux_ray.jobs.job import JobFailure


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errors.Overloaded("busy", None, 7), RetryLater(7.0, is_lost=False)),
        (errors.QuotaSpent("for today", None, 60), RetryLater(60.0, is_lost=False)),
        (errors.TierUnavailable("down"), RetryLater(5.0, is_lost=False)),
        (errors.ReplicaFailed("died"), RetryLater(1.0, is_lost=True)),
        (errors.DeadlinePassed("slow"), RetryLater(1.0, is_lost=True)),
        (RuntimeError("a mistake"), RetryLater(1.0, is_lost=True)),
        (None, RetryLater(1.0, is_lost=True)),
        (errors.BadReference("no image"), JobFailure("invalid_image", "no image")),
        (errors.UnknownTier("gone"), JobFailure("model_not_found", "gone")),
        (errors.OutOfMemory("too large"), JobFailure("out_of_memory", "too large")),
        # A folder that is not mounted, perhaps.
        (ResultMissing("/a/path"), RetryLater(1.0, is_lost=True)),
        (ResultTooLarge("name"), LOST),
    ],
)
def test_errors_have_their_outcome(error, outcome):
    assert outcome_of(error, num_lost=0) == outcome


def test_pauses_grow_up_to_a_bound():
    pauses = [outcome_of(RuntimeError(), num_lost).after_s for num_lost in range(10)]
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[-1] == MAX_PAUSE_S
