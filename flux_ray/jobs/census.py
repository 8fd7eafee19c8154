"""Count the jobs and webhooks of the database by state, for whoever watches the cluster."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from sqlalchemy import func, select

from flux_ray.jobs.database import Database
from flux_ray.jobs.table import JOBS

Count: TypeAlias = Mapping[tuple[str, str], int]
# Called with a census, field by field.
ShowCensus = Callable[[Count, Mapping[str, float], Mapping[str, int]], None]


class Census(NamedTuple):
    """Jobs by tier and state, seconds since each tier's oldest waiting one came, and webhooks."""

    jobs: Count
    oldest_s: Mapping[str, float]
    webhooks: Mapping[str, int]


# Every gateway counts all jobs that are kept: 20 ms for ten thousand of them in SQLite.
PERIOD_S = 10.0


async def take_census(database: Database) -> Census:
    """Count all jobs and webhooks that are kept. Raises StoreLost."""
    waited_s = database.now - func.min(JOBS.c.created_at_s)
    counted = select(
        JOBS.c.tier, JOBS.c.status, func.count().label("num"), waited_s.label("waited_s")
    ).group_by(JOBS.c.tier, JOBS.c.status)
    rows = await database.execute(counted)
    posted = select(JOBS.c.webhook_state, func.count().label("num"))
    posted = posted.where(JOBS.c.webhook_state.is_not(None)).group_by(JOBS.c.webhook_state)
    hooks = await database.execute(posted)
    return Census(
        {(row["tier"], row["status"]): row["num"] for row in rows},
        {
            row["tier"]: max(0.0, float(row["waited_s"]))
            for row in rows
            if row["status"] == "pending"
        },
        {row["webhook_state"]: row["num"] for row in hooks},
    )
