"""Removes what has expired: first a job's pictures, then its row, so that none is forgotten."""

import asyncio
import logging

from flux_ray.errors import StoreLost
from flux_ray.jobs.results import Results
from flux_ray.jobs.store import Store

logger = logging.getLogger("ray.serve")

PERIOD_S = 60.0
BATCH = 100


async def clean_up(store: Store, results: Results) -> int:
    """Remove all jobs that have expired; how many. Raises StoreLost and ResultsLost."""
    num_removed = 0
    while job_ids := await store.expired(BATCH):
        for job_id in job_ids:
            await results.remove_job(job_id)
            await store.remove(job_id)
        num_removed += len(job_ids)
    return num_removed


async def keep_clean(store: Store, results: Results, period_s: float = PERIOD_S) -> None:
    """For ever. Several gateways may do so: what is gone already is no error."""
    while True:
        try:
            await clean_up(store, results)
        except StoreLost as error:
            logger.warning("expired jobs stay for now: %s", error)
        await asyncio.sleep(period_s)
