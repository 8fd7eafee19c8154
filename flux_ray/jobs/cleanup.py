"""Removes what has expired: first a job's images, then its row, so that none is forgotten.

Ends jobs that no worker takes: of a tier that nobody serves, or a release that nobody runs.

Each gateway leaves such a job to others. Whether there are any, nobody knows; but if it lies there
for as long as ended jobs are kept, and nothing like it was begun meanwhile, its caller is told.
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
# Of one round: there may be many, and the next round comes.
ABANDONED_BATCH = 1000

PROTOCOL_OF = func.coalesce(JOBS.c.protocol, 0)


class Claims(NamedTuple):
    """What changes when somebody takes the job, or one like it."""

    attempt: int
    claimable_at_s: float
    begun_at_s: float | None


class Abandoned:
    """Looks at the jobs that this gateway takes none of.

    `tiers`: those that it serves, None for all. `keep_s`: by its own clock, which nobody sets, and
    from when it began: a cluster that was off has lost nothing.
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
        """End those that have lain here long enough; `unread`: ids of others that it left.

        Raises StoreLost.
        """
        begun_s = self._silence.begin()
        rows = await self._database.execute(self._left(unread))
        begun = await self._begun_at_s() if rows else {}
        self._silence.look(
            {
                row["job_id"]: Claims(
                    row["attempt"],
                    row["claimable_at_s"],
                    # Of one that names no later protocol, those like it say nothing.
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
        """When a job of each tier and protocol was last begun."""
        last = func.max(JOBS.c.started_at_s).label("last")
        query = select(JOBS.c.tier, PROTOCOL_OF.label("protocol_"), last)
        query = query.where(JOBS.c.started_at_s.is_not(None)).group_by(JOBS.c.tier, PROTOCOL_OF)
        rows = await self._database.execute(query)
        return {(row["tier"], row["protocol_"]): row["last"] for row in rows}


def latest(begun: Mapping[tuple[str, int], float], tier: str, protocol: int) -> float | None:
    """When somebody last began a job of that tier who can read that protocol."""
    times = (at_s for (name, number), at_s in begun.items() if name == tier and number >= protocol)
    return max(times, default=None)


PERIOD_S = 60.0
EXPIRED_BATCH = 100


async def clean_up(store: Store, results: Results) -> int:
    """Remove the jobs that have expired, but for those whose images stay; how many.

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
