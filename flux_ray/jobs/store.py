"""The store of jobs: accept, claim, beat, end, cancel and find, each one transaction.

Tells which rows have stayed as they are for so long, by a clock that nobody sets.
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

# Of `after_s`: what one look may add. Time in which nobody could look is not silence: the database
# or this process was away, and the others may have been as well.
MAX_GAP = 1 / 3


class Seen(NamedTuple, Generic[M]):
    """What was seen of a row, and for how many seconds nothing else was."""

    mark: M
    silent_s: float


class Silence(Generic[M]):
    """Rows by their ids, each with a mark that changes with every sign of life.

    Whoever watches counts by its own `clock`: clocks that are set, here or at the database, make
    nobody silent. It has to watch for `after_s` itself before it says so of anybody.
    """

    def __init__(self, after_s: float, clock: Clock = time.monotonic) -> None:
        self._after_s = after_s
        self._clock = clock
        self._seen: dict[str, Seen[M]] = {}
        self._seen_at_s: float | None = None

    def begin(self) -> float:
        """Return the time of a look that is about to begin, for `look`."""
        return self._clock()

    def look(self, marks: Mapping[str, M], begun_s: float) -> None:
        """Take down what there is to see; rows that are not among it are forgotten."""
        gap_s = 0.0
        if self._seen_at_s is not None:
            # From when the last look was over: what it saw may have been true until then.
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
        """Those that gave no sign for `after_s`, with the marks that they had all the while."""
        return {
            name: seen.mark for name, seen in self._seen.items() if seen.silent_s >= self._after_s
        }


MAX_TRIES = 5
# A lost worker is noticed so much later than it has to be, at most.
MAX_WATCH_PERIOD_S = 1.0
LOOKS_PER_LEASE = 10
EVERYTHING = Wanted()
# Of an owner who has as many jobs as it may.
JOBS_RETRY_AFTER_S = 5


class Store:
    """Jobs in a database that several gateways share. Everything raises StoreLost.

    `lease_s`: a worker that gives no sign for so long has lost its job, by the `clock` of whoever
    watches, which nobody sets. `keep_s`: an ended job is found for so long, by the database's clock
    like all that is kept: it is for the caller's days, and the gateways that wrote it may be gone.
    `protocol`: of the requests that are packed here; those of a later one are left to others.
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

    async def accept(self, offer: JobSubmission, packed: dict[str, Any], is_whole: bool) -> Job:
        """The job of an offer, a new one or that of the same key; raises KeyReused.

        RateLimited if its owner has as many as it may, whoever else takes some in for it just now.
        One that is not whole is claimable only when it was admitted.
        """
        turn = None if offer.max_active is None else offer.owner
        for tries in range(MAX_TRIES):
            row = await self._database.first(
                insertion(self._database, offer, packed, is_whole, self.protocol), turn
            )
            if row is not None:
                return job_of(row)
            named = offer.idempotency
            if named and (known := await self.known(offer.owner, named)):
                return known
            # Else the key was that of an expired job, and is free now.
            if offer.max_active is not None and (named is None or tries):
                raise too_many(offer.max_active)
        raise StoreLost("the job of this idempotency key comes and goes")

    async def admit(self, job_id: str) -> Job | None:
        """It has come in whole; None if it never will."""
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
        """How often `watch` is to be called."""
        return min(self.lease_s / LOOKS_PER_LEASE, MAX_WATCH_PERIOD_S)

    async def watch(self) -> bool:
        """Look for signs of life of all workers; whether some job's gave none for `lease_s`."""
        begun_s = self._silence.begin()
        rows = await self._database.execute(running())
        self._silence.look({row["job_id"]: sign_of(row) for row in rows}, begun_s)
        return bool(self._silence.silent)

    async def claim(self, worker: str, wanted: Wanted = EVERYTHING) -> Lease | None:
        """The job that has waited longest or lost its worker, of those that are wanted; or None."""
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
        """Keep the lease; False if it is no more: cancelled, or another's.

        `standing`: where the worker waits with it; None: it does not, or does not know.
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
        """What it will look like, until it ends or is another's; False as for beat."""
        return await self._change(held(lease), {"result": asdict(JobResult(previews, {}))})

    async def give_back(self, lease: Lease, after_s: float = 0.0, is_lost: bool = False) -> bool:
        """Let another do it, `after_s` from now; `is_lost` counts as a lost worker would.

        At once: it keeps its place before those that came later.
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
        """It is ready; False if the lease is another's or the job ended: nothing was changed."""
        return await self._end(held(lease), "ready", result=asdict(result), progress=1.0)

    async def fail(self, lease: Lease, failure: JobFailure, end: End = "failed") -> bool:
        """There will be no image; False as for finish."""
        return await self._end(held(lease), end, failure=asdict(failure))

    async def cancel(self, owner: str, job_id: str) -> bool:
        """End it, running or not; False if there is nothing of the owner's to end."""
        is_theirs = and_(
            JOBS.c.job_id == job_id,
            JOBS.c.owner == owner,
            JOBS.c.status.in_(("pending", "running")),
        )
        return await self._end(is_theirs, "cancelled")

    async def abandon(self, job_id: str, attempt: int, failure: JobFailure) -> bool:
        """End a job that nobody takes; False if somebody did since that attempt."""
        is_left = and_(
            JOBS.c.job_id == job_id, JOBS.c.attempt == attempt, JOBS.c.status == "pending"
        )
        return await self._end(is_left, "failed", failure=asdict(failure))

    async def find(self, owner: str, job_id: str) -> Job | None:
        """The owner's job; other people's are as if they were not there."""
        return await self._find(and_(JOBS.c.job_id == job_id, JOBS.c.owner == owner))

    async def list(
        self,
        owner: str,
        *,
        limit: int,
        before: ListPlace | None = None,
        state: Status | None = None,
    ) -> tuple[Job, ...]:
        """The owner's jobs, newest first, those of one state only; `before`: the last page's end.

        Jobs that come or go meanwhile move nobody to another page.
        """
        page = page_of(owner, limit, before, state, self._is_kept())
        return tuple(map(job_of, await self._database.execute(page)))

    async def position_of(self, job_id: str) -> int | None:
        """How many jobs of its tier are claimed before it; None if it does not wait for that."""
        row = await self._database.first(num_before(job_id))
        return None if row is None else int(row["num_jobs"])

    async def num_active(self, owner: str) -> int:
        """How many of the owner's jobs have not ended, those that are still coming in too."""
        query = select(num_active(self._database, owner).label("num_jobs"))
        [counted] = await self._database.execute(query)
        return int(counted["num_jobs"])

    async def expired(self, limit: int, num_skipped: int = 0) -> tuple[str, ...]:
        """Jobs that nobody finds or hears of any more: their results may go, then they."""
        query = select(JOBS.c.job_id).where(self._is_over()).order_by(JOBS.c.expires_at_s)
        query = query.limit(limit).offset(num_skipped)
        return tuple(row["job_id"] for row in await self._database.execute(query))

    async def remove(self, job_id: str) -> None:
        """Forget a job that has expired."""
        gone = and_(JOBS.c.job_id == job_id, self._is_over())
        await self._database.first(delete(JOBS).where(gone).returning(JOBS.c.job_id))

    async def known(self, owner: str, idempotency: Idempotency) -> Job | None:
        """The owner's job of that key, if there is one. Raises KeyReused."""
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
        # Of one without a result, no preview is left either.
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
        """It has expired, and nobody is still to be told of it."""
        is_expired = JOBS.c.expires_at_s <= self._database.now
        return and_(is_expired, JOBS.c.webhook_due_at_s.is_(None))

    async def _change(self, condition: ColumnElement[bool], values: dict[str, Any]) -> bool:
        changed = update(JOBS).where(condition).values(values).returning(JOBS.c.job_id)
        return await self._database.first(changed) is not None


def too_many(limit: int) -> RateLimited:
    """How many at once are jobs that wait, too."""
    message = f"this key has {limit} jobs that are not done: as many as it may"
    return RateLimited(message, None, JOBS_RETRY_AFTER_S, limit, 0)


def webhook_due_at(now: ColumnElement[float]) -> dict[str, Any]:
    """What makes the webhook of a job due, if it has one."""
    has_one = JOBS.c.webhook_url.is_not(None)
    return {
        "webhook_state": case((has_one, "due"), else_=None),
        "webhook_due_at_s": case((has_one, now), else_=None),
    }


def held(lease: Lease) -> ColumnElement[bool]:
    """The lease is the job's present one."""
    return and_(
        JOBS.c.job_id == lease.job_id,
        JOBS.c.attempt == lease.attempt,
        JOBS.c.status == "running",
    )
