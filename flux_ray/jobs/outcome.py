"""What becomes of a job whose attempt failed: another one, after a pause, or its end."""

from typing import NamedTuple

from flux_ray.errors import (
    FluxError,
    OutOfMemory,
    Overloaded,
    RateLimited,
    StoreLost,
    TierUnavailable,
)
from flux_ray.jobs.job import JobFailure
from flux_ray.jobs.reading import Unreadable
from flux_ray.jobs.results import ResultTooLarge

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
# Each attempt takes a replica's turn before it reads: not too often while a store is away.
AWAY_PAUSE_S = 5.0

LOST = JobFailure("server_error", "the picture could not be drawn")


class RetryLater(NamedTuple):
    """Another attempt, so much later; `is_lost` if it counts against the job."""

    after_s: float
    is_lost: bool


def outcome_of(error: BaseException | None, num_lost: int) -> RetryLater | JobFailure:
    """After `error` in an attempt (None: it was cancelled from within).

    A job waits for its turn as long as that takes, and for its references as long as their store is
    away. What may be the job's own fault is tried again
    too, as a whole cluster may have died under it; how often, the worker decides by `num_lost`.
    What needs more memory than a card has would need it again: that is its end.
    """
    if isinstance(error, (Overloaded, RateLimited, TierUnavailable)):
        return RetryLater(float(error.retry_after_s or FIRST_PAUSE_S), is_lost=False)
    if isinstance(error, Unreadable):
        return RetryLater(MAX_PAUSE_S, is_lost=False)
    if isinstance(error, StoreLost):
        return RetryLater(AWAY_PAUSE_S, is_lost=False)
    if isinstance(error, OutOfMemory) or (isinstance(error, FluxError) and error.status < 500):
        return JobFailure(error.code, error.message)
    if isinstance(error, ResultTooLarge):
        return LOST
    return RetryLater(min(FIRST_PAUSE_S * 2**num_lost, MAX_PAUSE_S), is_lost=True)
