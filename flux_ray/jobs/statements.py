"""The statements by which workers claim jobs: which is next, and what becomes of its row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    RowMapping,
    ScalarSelect,
    Select,
    UpdateBase,
    and_,
    case,
    false,
    func,
    or_,
    select,
    tuple_,
    update,
)

from flux_ray.jobs.rows import COLUMNS
from flux_ray.jobs.table import JOBS

# A statement may see what one wrote that began after it: their times differ, with no clock set.
SLACK_S = 5.0


@dataclass(frozen=True)
class Wanted:
    """Which jobs a worker takes now; it says so with every claim.

    `tiers`: those that its gateway serves, None for all. `full_tiers`: no more of these. `busy`:
    tiers and owners who have as many of them as an owner may. `unread`: jobs, by their ids, that
    it could not read.
    """

    tiers: frozenset[str] | None = None
    full_tiers: frozenset[str] = frozenset()
    busy: frozenset[tuple[str, str]] = frozenset()
    unread: frozenset[str] = frozenset()


class Sign(NamedTuple):
    """What a worker changes with every sign of life.

    Gateways of a release without beats move the lease's end alone.
    """

    attempt: int
    beat: int
    claimable_at_s: float


Signs = Mapping[str, Sign]


def running() -> Select[tuple[object, ...]]:
    """Select the signs of all workers: `sign_of` reads a row."""
    beat = func.coalesce(JOBS.c.beat, 0).label("beat")
    columns = (JOBS.c.job_id, JOBS.c.attempt, beat, JOBS.c.claimable_at_s)
    has_lease = JOBS.c.claimable_at_s.is_not(None)
    return select(*columns).where(JOBS.c.status == "running", has_lease)


def sign_of(row: RowMapping) -> Sign:
    """Return what a row of `running` says."""
    return Sign(row["attempt"], row["beat"], row["claimable_at_s"])


def claim_of(
    worker: str,
    job_id: ScalarSelect[str],
    now: ColumnElement[float],
    lease_s: float,
) -> UpdateBase:
    """Make that job the worker's; one that was running has lost its worker."""
    return (
        update(JOBS)
        .where(JOBS.c.job_id == job_id)
        .values(
            status="running",
            worker=worker,
            progress=0.0,
            result=None,
            standing=None,
            put_off_s=None,
            attempt=JOBS.c.attempt + 1,
            num_lost=JOBS.c.num_lost + case((JOBS.c.status == "running", 1), else_=0),
            started_at_s=func.coalesce(JOBS.c.started_at_s, now),
            claimable_at_s=now + lease_s,
        )
        .returning(*COLUMNS)
    )


def next_job(
    wanted: Wanted, silent: Signs, now: ColumnElement[float], protocol: int
) -> ScalarSelect[str]:
    """Select what has waited longest of all that is wanted and can be read.

    `silent`: running jobs whose workers gave no sign; one that gives one now keeps its job.
    """
    due = JOBS.alias()
    # The index holds nothing else.
    conditions: list[ColumnElement[bool]] = [due.c.claimable_at_s.is_not(None)]
    is_waiting = and_(due.c.status == "pending", is_due(due.c, "claimable_at_s", "put_off_s", now))
    conditions.append(or_(is_waiting, is_silent(due.c, silent)))
    conditions.append(func.coalesce(due.c.protocol, 0) <= protocol)
    if wanted.tiers is not None:
        conditions.append(due.c.tier.in_(wanted.tiers))
    if wanted.full_tiers:
        conditions.append(due.c.tier.not_in(wanted.full_tiers))
    if wanted.busy:
        conditions.append(tuple_(due.c.tier, due.c.owner).not_in(wanted.busy))
    if wanted.unread:
        conditions.append(due.c.job_id.not_in(wanted.unread))
    query = select(due.c.job_id).where(*conditions).order_by(due.c.claimable_at_s, due.c.job_id)
    # SQLite has one writer at a time and leaves the lock out.
    return query.limit(1).with_for_update(skip_locked=True).scalar_subquery()


def is_due(columns: Any, at: str, put_off: str, now: ColumnElement[float]) -> ColumnElement[bool]:
    """Its time has come, or more is left of the pause than it ever was: the clock was set back."""
    at_s, put_off_s = columns[at], columns[put_off]
    return or_(at_s <= now, at_s > now + put_off_s + SLACK_S)


def is_silent(columns: Any, silent: Signs) -> ColumnElement[bool]:
    """It is one of these, and its worker has still given no sign."""
    if not silent:
        return false()
    beat = func.coalesce(columns.beat, 0)
    unchanged = (
        and_(
            columns.job_id == job_id,
            columns.attempt == sign.attempt,
            beat == sign.beat,
            columns.claimable_at_s == sign.claimable_at_s,
        )
        for job_id, sign in silent.items()
    )
    return and_(columns.status == "running", or_(*unchanged))
