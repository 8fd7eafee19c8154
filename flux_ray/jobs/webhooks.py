"""The postman of a gateway: tells of ended jobs by webhook, at least once, until it is taken.

The mailbox: which webhooks of ended jobs are due, each statement one transaction.
"""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, and_, select, update

from flux_ray.errors import StoreLost
from flux_ray.jobs.database import Database
from flux_ray.jobs.job import Job, Webhook
from flux_ray.jobs.lease_worker import POLL_S, Busy, LeasedJob, LeaseWorker
from flux_ray.jobs.statements import COLUMNS, is_due, job_of
from flux_ray.jobs.table import JOBS

WEBHOOK = tuple(JOBS.c[f"webhook_{name}"] for name in ("url", "secret", "attempt"))


@dataclass(frozen=True)
class WebhookDelivery:
    """The right to tell of a job's end, until another attempt takes it.

    `num_failed` counts the attempts that were not taken at the other end.
    """

    job: Job
    webhook: Webhook
    attempt: int
    num_failed: int

    @property
    def job_id(self) -> str:
        """Whose end it tells of."""
        return self.job.job_id

    @property
    def num_lost(self) -> int:
        """Attempts of which nobody told how they went: their gateways were lost."""
        return self.attempt - 1 - self.num_failed


class WebhookOutbox:
    """Letters in a database that several gateways share. Everything raises StoreLost.

    `lease_s`: a gateway that is silent for so long has lost its letter; another posts it again.
    That goes by the database's clock: where it is set, a letter is posted once more, or a little
    sooner, as letters may be.
    """

    def __init__(self, database: Database, lease_s: float) -> None:
        self._database = database
        self._lease_s = lease_s

    async def claim(self, but_of: Collection[str] = ()) -> WebhookDelivery | None:
        """The letter that is due the longest, but of those owners; None if there is none."""
        now = self._database.now
        row = await self._database.first(
            update(JOBS)
            .where(JOBS.c.job_id == longest_due(now, but_of))
            .values(
                webhook_attempt=JOBS.c.webhook_attempt + 1,
                webhook_due_at_s=now + self._lease_s,
                webhook_put_off_s=self._lease_s,
            )
            .returning(*COLUMNS, *WEBHOOK)
        )
        if row is None:
            return None
        webhook = Webhook(row["webhook_url"], row["webhook_secret"])
        return WebhookDelivery(
            job_of(row), webhook, row["webhook_attempt"], row["webhook_num_failed"]
        )

    async def delivered(self, letter: WebhookDelivery) -> None:
        """It was taken, if late: no other attempt is needed."""
        await self._change(JOBS.c.job_id == letter.job_id, state="delivered", due_at_s=None)

    async def put_off(self, letter: WebhookDelivery, after_s: float) -> None:
        """It was not taken: once more, `after_s` from now."""
        due_at_s = self._database.now + after_s
        num_failed = letter.num_failed + 1
        await self._change(
            held(letter), num_failed=num_failed, due_at_s=due_at_s, put_off_s=after_s
        )

    async def give_up(self, letter: WebhookDelivery) -> None:
        """It is not tried again."""
        await self._change(held(letter), state="given up", due_at_s=None)

    async def give_back(self, letter: WebhookDelivery) -> None:
        """Let another gateway post it, at once; it is no lost attempt.

        Its number is the next attempt's: whoever gives back changes nothing afterwards.
        """
        # No late one has that number: only its holder makes it free.
        await self._change(held(letter), attempt=letter.attempt - 1, due_at_s=self._database.now)

    async def _change(self, condition: ColumnElement[bool], **values: Any) -> None:
        named = {f"webhook_{name}": value for name, value in values.items()}
        changed = update(JOBS).where(condition).values(named).returning(JOBS.c.job_id)
        await self._database.execute(changed)


def longest_due(now: ColumnElement[float], but_of: Collection[str]) -> ScalarSelect[str]:
    """The job whose letter has waited longest, for one of several who claim at once."""
    due = JOBS.alias()
    is_there = due.c.webhook_due_at_s.is_not(None)
    has_come = is_due(due.c, "webhook_due_at_s", "webhook_put_off_s", now)
    return (
        select(due.c.job_id)
        .where(is_there, has_come, due.c.owner.not_in(but_of))
        .order_by(due.c.webhook_due_at_s)
        .limit(1)
        # SQLite has one writer at a time and leaves the lock out.
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


def held(letter: WebhookDelivery) -> ColumnElement[bool]:
    """The attempt is the letter's latest one, and nobody heard of another's success."""
    return and_(
        JOBS.c.job_id == letter.job_id,
        JOBS.c.webhook_attempt == letter.attempt,
        JOBS.c.webhook_state == "due",
    )


logger = logging.getLogger("ray.serve")

MAX_POSTING = 64
# A receiver that hangs holds up its own owner only.
MAX_POSTING_PER_OWNER = 16

# The body, in the words of the dialect that took the job in; may raise StoreLost.
MessageOf = Callable[[Job], Awaitable[bytes]]
# Posts a body under an id by which repeats are known; raises NotTaken.
Post = Callable[[Webhook, str, bytes], Awaitable[None]]


class NotTaken(Exception):
    """The other end did not answer with a success; says why, and nothing of what it answered."""


class LostTooOften(NotTaken):
    """With so many gateways that it may be what ends them."""

    def __init__(self) -> None:
        super().__init__("it was lost too often")


@dataclass(frozen=True)
class Mail:
    """How ended jobs are told of. `timeout_s`: `post` takes no longer."""

    message_of: MessageOf
    post: Post
    timeout_s: float = 30.0

    @property
    def lease_s(self) -> float:
        """When a gateway that posts is lost for sure: its message and its notes take time too."""
        return self.timeout_s + 30.0


class WebhookWorker(LeaseWorker):
    """Posts one letter after another.

    `retries_s`: the pauses before a letter that was not taken is posted again. `max_lost`: one that
    was lost with so many gateways is given up.
    """

    def __init__(
        self,
        mailbox: WebhookOutbox,
        mail: Mail,
        retries_s: Sequence[float],
        max_lost: int,
        poll_s: float = POLL_S,
    ) -> None:
        super().__init__(MAX_POSTING, MAX_POSTING_PER_OWNER, poll_s)
        self._mailbox = mailbox
        self._mail = mail
        self._retries_s = retries_s
        self._max_lost = max_lost

    async def claim(self, busy: Busy) -> LeasedJob | None:
        """The delivery of the letter that is due the longest."""
        if busy.pools:
            return None
        letter = await self._mailbox.claim([owner for _, owner in busy.owners])
        return None if letter is None else LeasedJob(letter.job.owner, self._deliver(letter))

    async def _deliver(self, letter: WebhookDelivery) -> None:
        posting = asyncio.create_task(self._post(letter))
        try:
            await asyncio.wait({posting})
            await self._conclude(letter, error_of(posting))
        except asyncio.CancelledError:
            posting.cancel()
            await asyncio.wait({posting})
            await self._leave(letter, posting)
            raise
        except StoreLost as error:
            # Its lease ends, and it is posted once more.
            logger.warning("webhook of job %s waits for a store: %s", letter.job_id, error)

    async def _post(self, letter: WebhookDelivery) -> None:
        if letter.num_lost >= self._max_lost:
            raise LostTooOften
        body = await self._mail.message_of(letter.job)
        await self._mail.post(letter.webhook, letter.job_id, body)

    async def _conclude(self, letter: WebhookDelivery, error: BaseException | None) -> None:
        if error is None:
            await self._mailbox.delivered(letter)
            return
        if isinstance(error, StoreLost):
            raise error
        is_last = isinstance(error, LostTooOften) or letter.num_failed >= len(self._retries_s)
        if is_last:
            logger.warning("webhook of job %s is given up: %s", letter.job_id, reason_of(error))
            await self._mailbox.give_up(letter)
            return
        after_s = self._retries_s[letter.num_failed]
        logger.info(
            "webhook of job %s waits for %g s: %s", letter.job_id, after_s, reason_of(error)
        )
        await self._mailbox.put_off(letter, after_s)

    async def _leave(self, letter: WebhookDelivery, posting: "asyncio.Task[None]") -> None:
        """Give it back, unless it is over: its end may be on its way to the mailbox already."""
        try:
            if posting.cancelled():
                await self._mailbox.give_back(letter)
            else:
                await self._conclude(letter, error_of(posting))
        except StoreLost as error:
            logger.warning("webhook of job %s waits for its lease: %s", letter.job_id, error)


def error_of(task: "asyncio.Task[None]") -> BaseException | None:
    """How a task that is over failed; None if it did not."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def reason_of(error: BaseException) -> str:
    """For the log. Of a mistake of ours where it is, not its words: they may quote the message."""
    if isinstance(error, NotTaken):
        return str(error)
    lines = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{lines}"
