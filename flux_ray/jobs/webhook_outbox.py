"""The mailbox: which webhooks of ended jobs are due, each statement one transaction."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, and_, select, update

from flux_ray.jobs.database import Database
from flux_ray.jobs.job import Job, Webhook
from flux_ray.jobs.rows import COLUMNS, job_of
from flux_ray.jobs.statements import is_due
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
