"""The statements by which workers claim jobs: which is next, and what becomes of its row.

Jobs as rows of their table, and back.

The statement that takes a job in, for an owner who may have so many at once.

Queries for lists of jobs: a page of an owner's, and how many wait before one.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from sqlalchemy import (
    Column,
    ColumnElement,
    RowMapping,
    ScalarSelect,
    Select,
    UpdateBase,
    and_,
    case,
    false,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from flux_ray.jobs.database import Database
from flux_ray.jobs.job import Job, JobFailure, JobResult, JobSubmission, ListPlace, Status
from flux_ray.jobs.table import JOBS
from flux_ray.request import QueuePosition

COLUMNS = tuple(JOBS.c[name] for name in Job.__dataclass_fields__)
RESULT = TypeAdapter(JobResult)
FAILURE = TypeAdapter(JobFailure)
STANDING = TypeAdapter(QueuePosition)


def bound(value: Any, column: Column[Any]) -> ColumnElement[Any]:
    """The value as what the column holds, or SQL as it is."""
    return value if isinstance(value, ColumnElement) else literal(value, column.type)


def job_of(row: RowMapping) -> Job:
    """The row as a value."""
    values = {name: row[name] for name in Job.__dataclass_fields__}
    if values["result"] is not None:
        values["result"] = RESULT.validate_python(values["result"])
    if values["failure"] is not None:
        values["failure"] = FAILURE.validate_python(values["failure"])
    # A gateway of an earlier release wrote none.
    values["metadata"] = values["metadata"] or {}
    if values["standing"] is not None:
        values["standing"] = STANDING.validate_python(values["standing"])
    return Job(**values)


# What did not come in whole by then was left by a gateway that ended.
ARRIVAL_S = 3600.0


def insertion(
    database: Database, offer: JobSubmission, packed: dict[str, Any], is_whole: bool, protocol: int
) -> UpdateBase:
    """Insert a job, unless its idempotency key is taken or its owner has as many as it may."""
    now = database.now
    insert = sqlite.insert if database.is_sqlite else postgresql.insert
    values = {
        "job_id": str(uuid.uuid4()),
        "owner": offer.owner,
        "tier": offer.request.tier,
        "packed": packed,
        "seed": offer.request.seed,
        "memo": offer.memo,
        "metadata": dict(offer.metadata),
        "created_at_s": now,
        "protocol": protocol,
    }
    if is_whole:
        values |= {"status": "pending", "claimable_at_s": now, "put_off_s": 0.0}
    else:
        values |= {"status": "arriving", "expires_at_s": now + ARRIVAL_S}
    if (idempotency := offer.idempotency) is not None:
        values["idempotency_key"] = idempotency.key
        values["fingerprint"] = idempotency.fingerprint
    if (webhook := offer.webhook) is not None:
        values["webhook_url"] = webhook.url
        values["webhook_secret"] = webhook.secret
        values["webhook_state"] = "waiting"
    row = select(*(bound(value, JOBS.c[name]) for name, value in values.items()))
    if offer.max_active is not None:
        row = row.where(num_active(database, offer.owner) < offer.max_active)
    inserted = insert(JOBS).from_select(list(values), row.where(true()))
    return inserted.on_conflict_do_nothing().returning(*COLUMNS)


def num_active(database: Database, owner: str) -> ScalarSelect[int]:
    """Count the owner's jobs that have not ended, those that are still coming in too."""
    mates = JOBS.alias()
    is_active = mates.c.status.in_(("arriving", "pending", "running"))
    is_kept = func.coalesce(mates.c.expires_at_s > database.now, True)
    query = select(func.count()).select_from(mates)
    return query.where(mates.c.owner == owner, is_active, is_kept).scalar_subquery()


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
