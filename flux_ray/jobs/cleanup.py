"""Removes what has expired: first a job's pictures, then its row, so that none is forgotten."""

import logging

from flux_ray.errors import ResultsLost, StoreLost
from flux_ray.jobs.lease_worker import repeat
from flux_ray.jobs.results import ResultMissing, Results
from flux_ray.jobs.store import Store

logger = logging.getLogger("ray.serve")

PERIOD_S = 60.0
EXPIRED_BATCH = 100


async def clean_up(store: Store, results: Results) -> int:
    """Remove the jobs that have expired, but for those whose pictures stay; how many.

    Raises StoreLost.
    """
    num_removed = num_kept = 0
    while job_ids := await store.expired(EXPIRED_BATCH, num_kept):
        gone = [await remove(store, results, job_id) for job_id in job_ids]
        num_removed += sum(gone)
        num_kept += len(gone) - sum(gone)
        if not any(gone):
            # It is not this job or that: the results store is away.
            break
    return num_removed


async def remove(store: Store, results: Results, job_id: str) -> bool:
    """Whether it is gone; one that cannot be removed does not hold up the others."""
    try:
        await results.remove_job(job_id)
    except (ResultsLost, ResultMissing) as error:
        logger.warning("expired job %s stays for now: %s", job_id, error)
        return False
    await store.remove(job_id)
    return True


async def clean_once(store: Store, results: Results) -> None:
    """As far as the stores answer."""
    try:
        await clean_up(store, results)
    except StoreLost as error:
        logger.warning("expired jobs stay for now: %s", error)


async def keep_clean(store: Store, results: Results, period_s: float = PERIOD_S) -> None:
    """For ever. Several gateways may do so: what is gone already is no error."""
    await repeat(lambda: clean_once(store, results), period_s)
