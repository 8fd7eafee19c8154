"""Queries for lists of jobs: a page of an owner's, and how many wait before one."""

from sqlalchemy import ColumnElement, Select, and_, func, or_, select, tuple_

from flux_ray.jobs.job import ListPlace, Status
from flux_ray.jobs.rows import COLUMNS, bound
from flux_ray.jobs.table import JOBS


def page_of(
    owner: str,
    limit: int,
    before: ListPlace | None,
    state: Status | None,
    is_kept: ColumnElement[bool],
) -> Select[tuple[object, ...]]:
    """Select an owner's jobs, newest first, from after `before`; the index of lists serves it."""
    conditions = [JOBS.c.owner == owner, JOBS.c.status != "arriving", is_kept]
    place = (JOBS.c.created_at_s, JOBS.c.job_id)
    if before is not None:
        mark = [bound(value, column) for value, column in zip(before, place, strict=True)]
        conditions.append(tuple_(*place) < tuple_(*mark))
    if state is not None:
        conditions.append(JOBS.c.status == state)
    newest_first = [column.desc() for column in place]
    return select(*COLUMNS).where(and_(*conditions)).order_by(*newest_first).limit(limit)


def num_before(job_id: str) -> Select[tuple[int]]:
    """Count the jobs of its tier that are claimed before a pending one; no row if it is not."""
    mine, others = JOBS.alias(), JOBS.alias()
    is_sooner = or_(
        others.c.claimable_at_s < mine.c.claimable_at_s,
        and_(
            others.c.claimable_at_s == mine.c.claimable_at_s,
            others.c.job_id < mine.c.job_id,
        ),
    )
    counted = (
        select(func.count())
        .select_from(others)
        .where(others.c.status == "pending", others.c.tier == mine.c.tier, is_sooner)
        .scalar_subquery()
    )
    pending = and_(mine.c.job_id == job_id, mine.c.status == "pending")
    return select(counted.label("num_jobs")).select_from(mine).where(pending)
