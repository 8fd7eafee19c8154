"""The background clean-up of a gateway: abandoned jobs are ended, expired ones are removed.

A job is abandoned if no gateway takes it, because nobody serves its tier or runs the release that
can read it. One gateway cannot see whether another would take it. So it waits for as long as ended
jobs are kept, and if no job of the same kind was started meanwhile, it ends the job as failed.

Of an expired job the images go first and the row last: without the row nobody would find them.
"""

import logging
import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

from sqlalchemy import Select, func, or_, select

from flux_ray.errors import ResultsLost, StoreLost
from flux_ray.jobs.database import Database
from flux_ray.jobs.images import ResultMissing, Results
from flux_ray.jobs.job import JobFailure
from flux_ray.jobs.lease_worker import repeat
from flux_ray.jobs.store import Clock, Silence, Store
from flux_ray.jobs.table import JOBS

logger = logging.getLogger("ray.serve")

NOT_SERVED = JobFailure("not_served", "no server here could take this job: its model is not served")
# Per round, so that one round stays short; the next one takes up the rest.
ABANDONED_BATCH = 1000

PROTOCOL_OF = func.coalesce(JOBS.c.protocol, 0)


class Claims(NamedTuple):
    """The values of a waiting job that change when a worker takes it, or another job like it."""

    attempt: int
    claimable_at_s: float
    begun_at_s: float | None


class Abandoned:
    """The pending jobs that this gateway leaves to others, watched until they are given up.

    `tiers` are those that this gateway serves, None for all. A job is given up after `keep_s`
    seconds without a change. They are counted by this process's monotonic clock from its first
    look, so that a cluster that was switched off for days does not end jobs when it comes back.
    """

    def __init__(
        self,
        database: Database,
        store: Store,
        tiers: Collection[str] | None,
        keep_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self._database = database
        self._store = store
        self._tiers = tiers
        self._silence: Silence[Claims] = Silence(keep_s, clock)

    async def end_all(self, unread: Collection[str] = ()) -> None:
        """End the jobs that nobody has taken for `keep_s`. Raises StoreLost.

        `unread` are the ids of jobs of its own tiers that this gateway could not read.
        """
        begun_s = self._silence.begin()
        rows = await self._database.execute(self._left(unread))
        begun = await self._begun_at_s() if rows else {}
        self._silence.look(
            {
                row["job_id"]: Claims(
                    row["attempt"],
                    row["claimable_at_s"],
                    # This gateway knows the job's protocol and cannot read it all the same: that
                    # others of the protocol are started does not mean that somebody can.
                    None
                    if row["job_id"] in unread
                    else latest(begun, row["tier"], row["protocol_"]),
                )
                for row in rows
            },
            begun_s,
        )
        for job_id, claims in self._silence.silent.items():
            if await self._store.abandon(job_id, claims.attempt, NOT_SERVED):
                logger.error("job %s is given up: nobody took it", job_id)

    def _left(self, unread: Collection[str]) -> Select[tuple[object, ...]]:
        is_left = [self._store.protocol < PROTOCOL_OF, JOBS.c.job_id.in_(unread)]
        if self._tiers is not None:
            is_left.append(JOBS.c.tier.not_in(self._tiers))
        columns = (JOBS.c.job_id, JOBS.c.tier, JOBS.c.attempt, JOBS.c.claimable_at_s)
        left = select(*columns, PROTOCOL_OF.label("protocol_"))
        left = left.where(JOBS.c.status == "pending", JOBS.c.claimable_at_s.is_not(None))
        return left.where(or_(*is_left)).order_by(JOBS.c.claimable_at_s).limit(ABANDONED_BATCH)

    async def _begun_at_s(self) -> dict[tuple[str, int], float]:
        """Return when a job was last started, by tier and protocol."""
        last = func.max(JOBS.c.started_at_s).label("last")
        query = select(JOBS.c.tier, PROTOCOL_OF.label("protocol_"), last)
        query = query.where(JOBS.c.started_at_s.is_not(None)).group_by(JOBS.c.tier, PROTOCOL_OF)
        rows = await self._database.execute(query)
        return {(row["tier"], row["protocol_"]): row["last"] for row in rows}


def latest(begun: Mapping[tuple[str, int], float], tier: str, protocol: int) -> float | None:
    """Return when a gateway that can read `protocol` last started a job of the tier, or None.

    Whoever reads a later protocol reads this one too.
    """
    times = (at_s for (name, number), at_s in begun.items() if name == tier and number >= protocol)
    return max(times, default=None)


PERIOD_S = 60.0
EXPIRED_BATCH = 100


async def clean_up(store: Store, results: Results) -> int:
    """Remove the expired jobs, and return how many. Raises StoreLost.

    A job whose images cannot be removed stays for the next round.
    """
    num_removed = num_kept = 0
    while job_ids := await store.expired(EXPIRED_BATCH, num_kept):
        gone = [await remove(store, results, job_id) for job_id in job_ids]
        num_removed += sum(gone)
        num_kept += len(gone) - sum(gone)
        if not any(gone):
            # Not one of a whole batch could be removed: the results store is away.
            break
    return num_removed


async def remove(store: Store, results: Results, job_id: str) -> bool:
    """Remove a job and its images; return False if its images could not be removed."""
    try:
        await results.remove_job(job_id)
    except (ResultsLost, ResultMissing) as error:
        logger.warning("expired job %s stays for now: %s", job_id, error)
        return False
    await store.remove(job_id)
    return True


async def clean_once(store: Store, results: Results) -> None:
    """Run one clean-up pass; stop if the database is unavailable."""
    try:
        await clean_up(store, results)
    except StoreLost as error:
        logger.warning("expired jobs stay for now: %s", error)


async def keep_clean(store: Store, results: Results, period_s: float = PERIOD_S) -> None:
    """Run a clean-up pass every `period_s` until cancelled.

    Several gateways may do so at once: a job that is already gone is no error.
    """
    await repeat(lambda: clean_once(store, results), period_s)
