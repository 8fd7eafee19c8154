"""The store of jobs: accept, claim, beat, end, cancel and find them, one transaction each.

`Silence` finds the jobs of lost workers: rows that have not changed for as long as a lease, by
the monotonic clock of the process that looks.
"""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict
from typing import Any, Generic, NamedTuple, TypeVar

from sqlalchemy import (
    ColumnElement,
    and_,
    case,
    delete,
    func,
    select,
    update,
)

from flux_ray.errors import KeyReused, RateLimited, StoreLost
from flux_ray.jobs.database import Database
from flux_ray.jobs.job import (
    End,
    Idempotency,
    Job,
    JobFailure,
    JobResult,
    JobSubmission,
    Lease,
    ListPlace,
    Status,
    StoredImage,
)
from flux_ray.jobs.statements import (
    COLUMNS,
    Sign,
    Wanted,
    claim_of,
    insertion,
    job_of,
    next_job,
    num_active,
    num_before,
    page_of,
    running,
    sign_of,
)
from flux_ray.jobs.table import JOBS
from flux_ray.request import PROTOCOL, QueuePosition

Clock = Callable[[], float]
M = TypeVar("M", bound=Hashable)

# The fraction of `after_s` that one look can add to a row's silence. Time without a look does not
# count: the database or this process was away, and the workers may have been cut off too.
MAX_GAP = 1 / 3


class Seen(NamedTuple, Generic[M]):
    """The mark that a row had at the last look, and for how many seconds it has had it."""

    mark: M
    silent_s: float


class Silence(Generic[M]):
    """A record of how long each row's mark, which every sign of life changes, has been the same.

    Time is counted by the watcher's own `clock`, so that setting the clock of a machine or of the
    database makes no row silent. A new watcher has to look for `after_s` seconds before it finds
    any row silent.
    """

    def __init__(self, after_s: float, clock: Clock = time.monotonic) -> None:
        self._after_s = after_s
        self._clock = clock
        self._seen: dict[str, Seen[M]] = {}
        self._seen_at_s: float | None = None

    def begin(self) -> float:
        """Return the time before the rows are read, to be passed to `look`."""
        return self._clock()

    def look(self, marks: Mapping[str, M], begun_s: float) -> None:
        """Record the marks of all rows; rows that are not among them are forgotten."""
        gap_s = 0.0
        if self._seen_at_s is not None:
            # Counted from the end of the last look: a mark that it read may have been new by then.
            gap_s = min(max(begun_s - self._seen_at_s, 0.0), MAX_GAP * self._after_s)
        self._seen = {name: self._seen_again(name, mark, gap_s) for name, mark in marks.items()}
        self._seen_at_s = self._clock()

    def _seen_again(self, name: str, mark: M, gap_s: float) -> Seen[M]:
        before = self._seen.get(name)
        if before is None or before.mark != mark:
            return Seen(mark, 0.0)
        return Seen(mark, before.silent_s + gap_s)

    @property
    def silent(self) -> dict[str, M]:
        """Return the rows whose mark has been the same for `after_s`, with that mark."""
        return {
            name: seen.mark for name, seen in self._seen.items() if seen.silent_s >= self._after_s
        }


MAX_TRIES = 5
# Seconds between two looks at most, by which a lost worker may be noticed late.
MAX_WATCH_PERIOD_S = 1.0
LOOKS_PER_LEASE = 10
EVERYTHING = Wanted()
# Seconds in `Retry-After` for an owner at its limit of jobs.
JOBS_RETRY_AFTER_S = 5


class Store:
    """Jobs in a database that several gateways share. Every method raises StoreLost.

    A worker that gives no heartbeat for `lease_s` loses its job; the gateway that looks measures
    this by its own monotonic `clock`. An ended job can be found for `keep_s`, by the database's
    clock: it is for the caller's days, and the gateway that wrote the row may be gone. Requests are
    stored with the number `protocol`, and jobs of a later one are left to other gateways.
    """

    def __init__(
        self,
        database: Database,
        lease_s: float,
        keep_s: float,
        clock: Clock = time.monotonic,
        protocol: int = PROTOCOL,
    ) -> None:
        self._database = database
        self.lease_s = lease_s
        self.protocol = protocol
        self._keep_s = keep_s
        self._silence: Silence[Sign] = Silence(lease_s, clock)

    async def accept(
        self, submission: JobSubmission, packed: dict[str, Any], is_whole: bool
    ) -> Job:
        """Insert a job and return it, or return the earlier one of the same idempotency key.

        A job that is not whole cannot be claimed before `admit`. Raises KeyReused, and RateLimited
        if the owner has `max_active` jobs, also if several gateways accept some at once.
        """
        turn = None if submission.max_active is None else submission.owner
        for tries in range(MAX_TRIES):
            row = await self._database.first(
                insertion(self._database, submission, packed, is_whole, self.protocol), turn
            )
            if row is not None:
                return job_of(row)
            named = submission.idempotency
            if named and (known := await self.known(submission.owner, named)):
                return known
            # No job has the key: that of an expired one, which `known` has freed now, stood in
            # the way; or the owner is at its limit.
            if submission.max_active is not None and (named is None or tries):
                raise too_many(submission.max_active)
        raise StoreLost("the job of this idempotency key comes and goes")

    async def admit(self, job_id: str) -> Job | None:
        """Make an arriving job claimable and return it; None if it has expired."""
        row = await self._database.first(
            update(JOBS)
            .where(JOBS.c.job_id == job_id, JOBS.c.status == "arriving", self._is_kept())
            .values(
                status="pending",
                claimable_at_s=self._database.now,
                put_off_s=0.0,
                expires_at_s=None,
            )
            .returning(*COLUMNS)
        )
        # Another gateway may have admitted it, for the same idempotency key.
        return job_of(row) if row is not None else await self._find(JOBS.c.job_id == job_id)

    @property
    def watch_period_s(self) -> float:
        """Return the seconds between two calls of `watch`."""
        return min(self.lease_s / LOOKS_PER_LEASE, MAX_WATCH_PERIOD_S)

    async def watch(self) -> bool:
        """Look at the heartbeats of all running jobs.

        Return whether some job's worker gave none for `lease_s`: then it can be claimed.
        """
        begun_s = self._silence.begin()
        rows = await self._database.execute(running())
        self._silence.look({row["job_id"]: sign_of(row) for row in rows}, begun_s)
        return bool(self._silence.silent)

    async def claim(self, worker: str, wanted: Wanted = EVERYTHING) -> Lease | None:
        """Claim the wanted job that has waited longest or lost its worker; None if none is."""
        now = self._database.now
        job_id = next_job(wanted, self._silence.silent, now, self.protocol)
        row = await self._database.first(claim_of(worker, job_id, now, self.lease_s))
        return None if row is None else Lease(job_of(row))

    async def beat(
        self,
        lease: Lease,
        progress: float | None = None,
        standing: QueuePosition | None = None,
    ) -> bool:
        """Renew a lease; return False if it has ended: the job was cancelled, or is another's.

        `standing` is the job's place in its tier's queue, or None if it does not wait there or
        this is not known.
        """
        values: dict[str, Any] = {
            "claimable_at_s": self._database.now + self.lease_s,
            "beat": func.coalesce(JOBS.c.beat, 0) + 1,
            "standing": None if standing is None else asdict(standing),
        }
        if progress is not None:
            values["progress"] = progress
        return await self._change(held(lease), values)

    async def show(self, lease: Lease, previews: tuple[StoredImage, ...]) -> bool:
        """Store the names of a running job's previews; return False if the lease has ended."""
        return await self._change(held(lease), {"result": asdict(JobResult(previews, {}))})

    async def give_back(self, lease: Lease, after_s: float = 0.0, is_lost: bool = False) -> bool:
        """Give a job back to be claimed again, `after_s` from now; `is_lost` adds to `num_lost`.

        Without `after_s` it keeps its place, by the time of its creation, in front of later jobs.
        Return False if the lease has ended.
        """
        values = {
            "status": "pending",
            "worker": None,
            "result": None,
            "standing": None,
            "num_lost": JOBS.c.num_lost + int(is_lost),
            "claimable_at_s": self._database.now + after_s if after_s else JOBS.c.created_at_s,
            "put_off_s": after_s,
        }
        return await self._change(held(lease), values)

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        """End a job as ready; return False, and change nothing, if the lease has ended."""
        return await self._end(held(lease), "ready", result=asdict(result), progress=1.0)

    async def fail(self, lease: Lease, failure: JobFailure, end: End = "failed") -> bool:
        """End a job without an image; return False, and change nothing, if the lease has ended."""
        return await self._end(held(lease), end, failure=asdict(failure))

    async def cancel(self, owner: str, job_id: str) -> bool:
        """Cancel the owner's pending or running job; return False if there is none."""
        is_theirs = and_(
            JOBS.c.job_id == job_id,
            JOBS.c.owner == owner,
            JOBS.c.status.in_(("pending", "running")),
        )
        return await self._end(is_theirs, "cancelled")

    async def abandon(self, job_id: str, attempt: int, failure: JobFailure) -> bool:
        """End a job that nobody takes; return False if somebody took it after that attempt."""
        is_left = and_(
            JOBS.c.job_id == job_id, JOBS.c.attempt == attempt, JOBS.c.status == "pending"
        )
        return await self._end(is_left, "failed", failure=asdict(failure))

    async def find(self, owner: str, job_id: str) -> Job | None:
        """Return the owner's job of that id, or None; jobs of other owners are not found."""
        return await self._find(and_(JOBS.c.job_id == job_id, JOBS.c.owner == owner))

    async def list(
        self,
        owner: str,
        *,
        limit: int,
        before: ListPlace | None = None,
        state: Status | None = None,
    ) -> tuple[Job, ...]:
        """Return a page of the owner's jobs, newest first, all or those in one state.

        `before` is the place of the last job on the page before. Pages start at a job and not at
        a number, so that jobs that come or go meanwhile make no page skip or repeat one.
        """
        page = page_of(owner, limit, before, state, self._is_kept())
        return tuple(map(job_of, await self._database.execute(page)))

    async def position_of(self, job_id: str) -> int | None:
        """Return how many jobs of its tier are claimed before a pending one, else None."""
        row = await self._database.first(num_before(job_id))
        return None if row is None else int(row["num_jobs"])

    async def num_active(self, owner: str) -> int:
        """Return how many of the owner's jobs have not ended, arriving ones included."""
        query = select(num_active(self._database, owner).label("num_jobs"))
        [counted] = await self._database.execute(query)
        return int(counted["num_jobs"])

    async def expired(self, limit: int, num_skipped: int = 0) -> tuple[str, ...]:
        """Return ids of jobs that have expired and have no webhook due: these can be removed.

        `num_skipped` passes over those at the front that could not be removed.
        """
        query = select(JOBS.c.job_id).where(self._is_over()).order_by(JOBS.c.expires_at_s)
        query = query.limit(limit).offset(num_skipped)
        return tuple(row["job_id"] for row in await self._database.execute(query))

    async def remove(self, job_id: str) -> None:
        """Delete the row of a job that has expired."""
        gone = and_(JOBS.c.job_id == job_id, self._is_over())
        await self._database.first(delete(JOBS).where(gone).returning(JOBS.c.job_id))

    async def known(self, owner: str, idempotency: Idempotency) -> Job | None:
        """Return the owner's job of that idempotency key, or None. Raises KeyReused.

        If the job has expired, the key is freed for another one.
        """
        is_same = and_(JOBS.c.owner == owner, JOBS.c.idempotency_key == idempotency.key)
        query = select(*COLUMNS, JOBS.c.fingerprint).where(is_same, self._is_kept())
        row = await self._database.first(query)
        if row is None:
            gone = and_(is_same, JOBS.c.expires_at_s <= self._database.now)
            await self._change(gone, {"idempotency_key": None})
            return None
        if row["fingerprint"] != idempotency.fingerprint:
            raise KeyReused("this idempotency key was used with another request")
        return job_of(row)

    async def _end(self, condition: ColumnElement[bool], status: str, **values: Any) -> bool:
        now = self._database.now
        # The column holds the previews of a running job: without a result they go as well.
        values = {"result": None, "standing": None} | values
        values |= {
            "status": status,
            "claimable_at_s": None,
            "finished_at_s": now,
            "expires_at_s": now + self._keep_s,
        } | webhook_due_at(now)
        return await self._change(condition, values)

    async def _find(self, condition: ColumnElement[bool]) -> Job | None:
        query = select(*COLUMNS).where(condition, JOBS.c.status != "arriving", self._is_kept())
        row = await self._database.first(query)
        return None if row is None else job_of(row)

    def _is_kept(self) -> ColumnElement[bool]:
        return func.coalesce(JOBS.c.expires_at_s > self._database.now, True)

    def _is_over(self) -> ColumnElement[bool]:
        """Return whether a job has expired and no webhook of it is due."""
        is_expired = JOBS.c.expires_at_s <= self._database.now
        return and_(is_expired, JOBS.c.webhook_due_at_s.is_(None))

    async def _change(self, condition: ColumnElement[bool], values: dict[str, Any]) -> bool:
        changed = update(JOBS).where(condition).values(values).returning(JOBS.c.job_id)
        return await self._database.first(changed) is not None


def too_many(limit: int) -> RateLimited:
    """Return the error for an owner that has `limit` unfinished jobs, pending ones included."""
    message = (
        f"this key already has {limit} unfinished jobs, its limit;"
        " wait for one to end or cancel one"
    )
    return RateLimited(message, None, JOBS_RETRY_AFTER_S, limit, 0)


def webhook_due_at(now: ColumnElement[float]) -> dict[str, Any]:
    """Return the column values that make the webhook of a job due, if it has one."""
    has_one = JOBS.c.webhook_url.is_not(None)
    return {
        "webhook_state": case((has_one, "due"), else_=None),
        "webhook_due_at_s": case((has_one, now), else_=None),
    }


def held(lease: Lease) -> ColumnElement[bool]:
    """Return whether the lease is still the job's current one."""
    return and_(
        JOBS.c.job_id == lease.job_id,
        JOBS.c.attempt == lease.attempt,
        JOBS.c.status == "running",
    )
