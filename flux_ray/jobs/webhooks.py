"""The webhooks of ended jobs: each is posted at least once, until the receiver answers 2xx.

`WebhookOutbox` keeps in the rows of jobs which webhooks are due. `WebhookWorker` claims them under
a lease, as jobs are claimed, posts them, and retries or gives up.
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

logger = logging.getLogger("ray.serve")

WEBHOOK = tuple(JOBS.c[f"webhook_{name}"] for name in ("url", "secret", "attempt"))
MAX_POSTING = 64
# For each owner, so that a receiver that hangs holds up only its own webhooks.
MAX_POSTING_PER_OWNER = 16


@dataclass(frozen=True)
class WebhookDelivery:
    """A claimed webhook: the right to post a job's end, until another attempt claims it.

    `num_failed` counts the earlier attempts that the receiver did not take.
    """

    job: Job
    webhook: Webhook
    attempt: int
    num_failed: int

    @property
    def job_id(self) -> str:
        return self.job.job_id

    @property
    def num_lost(self) -> int:
        """Return how many attempts have no known outcome, because their gateways were lost."""
        return self.attempt - 1 - self.num_failed


class WebhookOutbox:
    """The webhooks due in a database that several gateways share. Every method raises StoreLost.

    A gateway has `lease_s` to post a webhook and say how it went; then another one posts it again.
    This goes by the database's clock: if somebody sets it, a webhook may be posted twice or sooner,
    which receivers have to expect anyway. Each call is one transaction.
    """

    def __init__(self, database: Database, lease_s: float) -> None:
        self._database = database
        self._lease_s = lease_s

    async def claim(self, but_of: Collection[str] = ()) -> WebhookDelivery | None:
        """Claim the webhook that has been due longest, except those of the owners `but_of`.

        Return None if there is none.
        """
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

    async def delivered(self, delivery: WebhookDelivery) -> None:
        """Record that the receiver took it, also if another attempt has claimed it meanwhile."""
        await self._change(JOBS.c.job_id == delivery.job_id, state="delivered", due_at_s=None)

    async def put_off(self, delivery: WebhookDelivery, after_s: float) -> None:
        """Record that the receiver did not take it, and have it posted again after `after_s`."""
        due_at_s = self._database.now + after_s
        num_failed = delivery.num_failed + 1
        await self._change(
            held(delivery), num_failed=num_failed, due_at_s=due_at_s, put_off_s=after_s
        )

    async def give_up(self, delivery: WebhookDelivery) -> None:
        """Record that it is not to be posted again."""
        await self._change(held(delivery), state="given up", due_at_s=None)

    async def give_back(self, delivery: WebhookDelivery) -> None:
        """Let another gateway post it at once; this attempt does not count as lost.

        The next attempt gets the same number, so call nothing else with this delivery afterwards.
        """
        # Only the holder of an attempt frees its number: no late call can come with it.
        await self._change(
            held(delivery), attempt=delivery.attempt - 1, due_at_s=self._database.now
        )

    async def _change(self, condition: ColumnElement[bool], **values: Any) -> None:
        named = {f"webhook_{name}": value for name, value in values.items()}
        changed = update(JOBS).where(condition).values(named).returning(JOBS.c.job_id)
        await self._database.execute(changed)


def longest_due(now: ColumnElement[float], but_of: Collection[str]) -> ScalarSelect[str]:
    """Select the job whose webhook has been due longest, except those of the owners `but_of`."""
    due = JOBS.alias()
    is_there = due.c.webhook_due_at_s.is_not(None)
    has_come = is_due(due.c, "webhook_due_at_s", "webhook_put_off_s", now)
    return (
        select(due.c.job_id)
        .where(is_there, has_come, due.c.owner.not_in(but_of))
        .order_by(due.c.webhook_due_at_s)
        .limit(1)
        # Gateways that claim at once skip each other's row. SQLite, with one writer at a time,
        # leaves the clause out.
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


def held(delivery: WebhookDelivery) -> ColumnElement[bool]:
    """Return whether the attempt is the latest one and the webhook is still due."""
    return and_(
        JOBS.c.job_id == delivery.job_id,
        JOBS.c.webhook_attempt == delivery.attempt,
        JOBS.c.webhook_state == "due",
    )


# Makes the body, in the shape of the API dialect that accepted the job; may raise StoreLost.
MessageOf = Callable[[Job], Awaitable[bytes]]
# Posts a body with an id by which the receiver recognizes repeats; raises NotTaken.
Post = Callable[[Webhook, str, bytes], Awaitable[None]]


class NotTaken(Exception):
    """The receiver did not answer 2xx; the message says why, and quotes nothing of the answer."""


class LostTooOften(NotTaken):
    """The webhook was lost with so many gateways that it may be what kills them."""

    def __init__(self) -> None:
        super().__init__("it was lost too often")


@dataclass(frozen=True)
class Mail:
    """The functions that make and post webhooks; `post` takes at most `timeout_s` seconds."""

    message_of: MessageOf
    post: Post
    timeout_s: float = 30.0

    @property
    def lease_s(self) -> float:
        """Return the lease in seconds: to make the body, post it, and record the outcome."""
        return self.timeout_s + 30.0


class WebhookWorker(LeaseWorker):
    """The worker that posts the webhooks which are due, of all jobs of the database.

    `retries_s` are the pauses in seconds before each repeat; after the last one the webhook is
    given up. It is also given up after it was lost with `max_lost` gateways.
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
        self._outbox = mailbox
        self._mail = mail
        self._retries_s = retries_s
        self._max_lost = max_lost

    async def claim(self, busy: Busy) -> LeasedJob | None:
        """Claim the webhook that has been due longest."""
        if busy.pools:
            return None
        delivery = await self._outbox.claim([owner for _, owner in busy.owners])
        return None if delivery is None else LeasedJob(delivery.job.owner, self._deliver(delivery))

    async def _deliver(self, delivery: WebhookDelivery) -> None:
        posting = asyncio.create_task(self._post(delivery))
        try:
            await asyncio.wait({posting})
            await self._conclude(delivery, error_of(posting))
        except asyncio.CancelledError:
            posting.cancel()
            await asyncio.wait({posting})
            await self._leave(delivery, posting)
            raise
        except StoreLost as error:
            # The outcome could not be recorded: it is posted again when its lease ends.
            logger.warning("webhook of job %s waits for a store: %s", delivery.job_id, error)

    async def _post(self, delivery: WebhookDelivery) -> None:
        if delivery.num_lost >= self._max_lost:
            raise LostTooOften
        body = await self._mail.message_of(delivery.job)
        await self._mail.post(delivery.webhook, delivery.job_id, body)

    async def _conclude(self, delivery: WebhookDelivery, error: BaseException | None) -> None:
        if error is None:
            await self._outbox.delivered(delivery)
            return
        if isinstance(error, StoreLost):
            raise error
        is_last = isinstance(error, LostTooOften) or delivery.num_failed >= len(self._retries_s)
        if is_last:
            logger.warning("webhook of job %s is given up: %s", delivery.job_id, reason_of(error))
            await self._outbox.give_up(delivery)
            return
        after_s = self._retries_s[delivery.num_failed]
        logger.info(
            "webhook of job %s waits for %g s: %s", delivery.job_id, after_s, reason_of(error)
        )
        await self._outbox.put_off(delivery, after_s)

    async def _leave(self, delivery: WebhookDelivery, posting: "asyncio.Task[None]") -> None:
        """Record the outcome if posting is over, else give the webhook back.

        It may be over although the task was cancelled: the outcome is then not to be lost.
        """
        try:
            if posting.cancelled():
                await self._outbox.give_back(delivery)
            else:
                await self._conclude(delivery, error_of(posting))
        except StoreLost as error:
            logger.warning("webhook of job %s waits for its lease: %s", delivery.job_id, error)


def error_of(task: "asyncio.Task[None]") -> BaseException | None:
    """Return the error of a finished task, or None if it succeeded."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def reason_of(error: BaseException) -> str:
    """Return the text for the log.

    For a bug it is the traceback without the error's text, which may quote the message.
    """
    if isinstance(error, NotTaken):
        return str(error)
    lines = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{lines}"
