"""The postman of a gateway: tells of ended jobs by webhook, at least once, until it is taken."""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from flux_ray.errors import StoreLost
from flux_ray.jobs.job import Job, Webhook
from flux_ray.jobs.lease_worker import POLL_S, Busy, LeasedJob, LeaseWorker
from flux_ray.jobs.webhook_outbox import WebhookDelivery, WebhookOutbox

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
