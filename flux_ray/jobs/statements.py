"""The larger SQL statements of the job store, as functions that build them.

They insert a job within its owner's limit, page through an owner's jobs, count the jobs in front of
one, and choose and claim the next job for a worker. `job_of` reads a row as a `Job`. The store runs
them; nothing here touches the database.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
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
    """Return the value as a literal of the column's type; SQL expressions stay as they are."""
    return value if isinstance(value, ColumnElement) else literal(value, column.type)


def job_of(row: RowMapping) -> Job:
    """Return the job of a row."""
    values = {name: row[name] for name in Job.__dataclass_fields__}
    if values["result"] is not None:
        values["result"] = RESULT.validate_python(values["result"])
    if values["failure"] is not None:
        values["failure"] = FAILURE.validate_python(values["failure"])
    # Gateways of an earlier release leave it null.
    values["metadata"] = values["metadata"] or {}
    if values["standing"] is not None:
        values["standing"] = STANDING.validate_python(values["standing"])
    return Job(**values)


# Seconds for the reference images of a job to be stored: if they take longer, the gateway that was
# at it has died, and the row expires.
ARRIVAL_S = 3600.0


def insertion(
    database: Database,
    submission: JobSubmission,
    packed: dict[str, Any],
    is_whole: bool,
    protocol: int,
) -> UpdateBase:
    """Insert a job, unless its idempotency key is taken or its owner is at `max_active`.

    It returns the new row, or none. `is_whole`: there are no reference images to wait for.
    """
    now = database.now
    insert = sqlite.insert if database.is_sqlite else postgresql.insert
    values = {
        "job_id": str(uuid.uuid4()),
        "owner": submission.owner,
        "tier": submission.request.tier,
        "packed": packed,
        "seed": submission.request.seed,
        "memo": submission.memo,
        "metadata": dict(submission.metadata),
        "created_at_s": now,
        "protocol": protocol,
    }
    if is_whole:
        values |= {"status": "pending", "claimable_at_s": now, "put_off_s": 0.0}
    else:
        values |= {"status": "arriving", "expires_at_s": now + ARRIVAL_S}
    if (idempotency := submission.idempotency) is not None:
        values["idempotency_key"] = idempotency.key
        values["fingerprint"] = idempotency.fingerprint
    if (webhook := submission.webhook) is not None:
        values["webhook_url"] = webhook.url
        values["webhook_secret"] = webhook.secret
        values["webhook_state"] = "waiting"
    row = select(*(bound(value, JOBS.c[name]) for name, value in values.items()))
    if submission.max_active is not None:
        row = row.where(num_active(database, submission.owner) < submission.max_active)
    inserted = insert(JOBS).from_select(list(values), row.where(true()))
    return inserted.on_conflict_do_nothing().returning(*COLUMNS)


def num_active(database: Database, owner: str) -> ScalarSelect[int]:
    """Count the owner's jobs that have not ended, including those whose images are arriving."""
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
    """Select a page of an owner's jobs, newest first, that starts after `before`.

    The index `flux_jobs_listed` has the same columns in the same order.
    """
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
    """Count the jobs of the same tier that are claimed before a pending job.

    It returns no row if the job is not pending.
    """
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


# A claim takes one job of those that are named. A statement may have some 32,000 parameters, and
# each job takes four.
MAX_SILENT = 5000
# A statement can see a row that was written by one that began after it. So `now` may be a little
# earlier than a time in the row though nobody has set the clock.
SLACK_S = 5.0


@dataclass(frozen=True)
class Wanted:
    """The jobs that a worker can take now, passed with every claim.

    `tiers` are those that its gateway serves, None for all. It takes none of `full_tiers`, none of
    the (tier, owner) pairs in `busy`, as those owners are at their limit, and none of the job ids
    in `unread`, which it could not read.
    """

    tiers: frozenset[str] | None = None
    full_tiers: frozenset[str] = frozenset()
    busy: frozenset[tuple[str, str]] = frozenset()
    unread: frozenset[str] = frozenset()


class Sign(NamedTuple):
    """The values of a running job's row of which its worker changes some at every heartbeat.

    Gateways of an earlier release do not count `beat`; they only move the lease's end.
    """

    attempt: int
    beat: int
    claimable_at_s: float


Signs = Mapping[str, Sign]


def running() -> Select[tuple[object, ...]]:
    """Select the heartbeat values of all running jobs; `sign_of` reads a row."""
    beat = func.coalesce(JOBS.c.beat, 0).label("beat")
    columns = (JOBS.c.job_id, JOBS.c.attempt, beat, JOBS.c.claimable_at_s)
    has_lease = JOBS.c.claimable_at_s.is_not(None)
    return select(*columns).where(JOBS.c.status == "running", has_lease)


def sign_of(row: RowMapping) -> Sign:
    """Return the heartbeat values in a row of `running`."""
    return Sign(row["attempt"], row["beat"], row["claimable_at_s"])


def claim_of(
    worker: str,
    job_id: ScalarSelect[str],
    now: ColumnElement[float],
    lease_s: float,
) -> UpdateBase:
    """Claim a job for a worker; if it was running, count its last worker as lost."""
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
    """Select the wanted job that has waited longest, of those packed by `protocol` or earlier.

    It is pending and due, or running and in `silent`: its worker gave no heartbeat for the length
    of a lease, and gives none before the statement runs.
    """
    due = JOBS.alias()
    # The index is partial, and is used only for queries that say this.
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
    # Workers that claim at once skip each other's row. SQLite, with one writer at a time, leaves
    # the clause out.
    return query.limit(1).with_for_update(skip_locked=True).scalar_subquery()


def is_due(columns: Any, at: str, put_off: str, now: ColumnElement[float]) -> ColumnElement[bool]:
    """Return whether the time in column `at` has come.

    Also if more is left than `put_off`, the whole pause: then the clock was set back meanwhile, and
    the job would wait for hours.
    """
    at_s, put_off_s = columns[at], columns[put_off]
    return or_(at_s <= now, at_s > now + put_off_s + SLACK_S)


def is_silent(columns: Any, silent: Signs) -> ColumnElement[bool]:
    """Return whether the row is one of `silent`, unchanged until this statement."""
    if not silent:
        return false()
    beat = func.coalesce(columns.beat, 0)
    row = tuple_(columns.job_id, columns.attempt, beat, columns.claimable_at_s)
    # No OR for each: SQLite nests these, a thousand deep at most.
    named = [(job_id, *sign) for job_id, sign in islice(silent.items(), MAX_SILENT)]
    return and_(columns.status == "running", row.in_(named))
