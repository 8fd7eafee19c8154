"""The mailbox: when webhooks are due, and who posts them; on SQLite and PostgreSQL alike."""

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from flux_ray.errors import StoreLost
from flux_ray.jobs.job import JobFailure, JobResult, Webhook
from flux_ray.jobs.serialization import pack
from flux_ray.jobs.webhooks import WebhookOutbox
from tests.jobs.conftest import KEEP_S

LEASE_S = 10.0
WEBHOOK = Webhook("https://example.org/hook?token=1", "s3cr3t")
RESULT = JobResult((), {})


@pytest.fixture
def mailbox(database) -> WebhookOutbox:
    return WebhookOutbox(database, LEASE_S)


@pytest.fixture
def end_job(store, offer):
    """`end_job(owner)`: a job that is ready, and whose webhook is due."""

    async def end(owner="anna", webhook=WEBHOOK) -> str:
        wanted = offer(owner=owner, webhook=webhook)
        job = await store.accept(wanted, pack(wanted.request).row, True)
        assert await store.finish(await store.claim("w"), RESULT)
        return job.job_id

    return end


async def state_of(database, job_id: str) -> tuple:
    query = "SELECT webhook_state, webhook_attempt, webhook_num_failed, webhook_due_at_s"
    async with database.connect() as connection:
        where = f" FROM flux_jobs WHERE job_id = '{job_id}'"
        return tuple((await connection.execute(text(query + where))).one())


@pytest.mark.parametrize("end", ["ready", "failed", "refused", "cancelled"])
async def test_every_end_is_told_of(store, mailbox, database, offer, clock, end):
    wanted = offer(webhook=WEBHOOK)
    job = await store.accept(wanted, pack(wanted.request).row, True)
    lease = await store.claim("w")
    assert await mailbox.claim() is None
    assert await state_of(database, job.job_id) == ("waiting", 0, 0, None)
    if end == "ready":
        await store.finish(lease, RESULT)
    elif end == "cancelled":
        await store.cancel("anna", job.job_id)
    else:
        await store.fail(lease, JobFailure("content_refused", "no"), end)
    assert await state_of(database, job.job_id) == ("due", 0, 0, clock.now_s)
    letter = await mailbox.claim()
    assert letter.job == await store.find("anna", job.job_id)
    assert (letter.job.status, letter.webhook) == (end, WEBHOOK)
    assert (letter.attempt, letter.num_failed, letter.num_lost) == (1, 0, 0)
    assert await mailbox.claim() is None


async def test_nobody_hears_who_did_not_ask(mailbox, database, end_job):
    job_id = await end_job(webhook=None)
    assert await mailbox.claim() is None
    assert await state_of(database, job_id) == (None, 0, 0, None)


async def test_a_late_worker_makes_nothing_due_again(store, mailbox, offer, pass_s):
    wanted = offer(webhook=WEBHOOK)
    await store.accept(wanted, pack(wanted.request).row, True)
    late = await store.claim("late")
    await pass_s(10)
    assert await store.finish(await store.claim("w"), RESULT)
    await mailbox.delivered(await mailbox.claim())
    assert not await store.finish(late, RESULT)
    assert await mailbox.claim() is None


async def test_one_that_was_delivered_is_due_no_more(mailbox, database, end_job, clock):
    job_id = await end_job()
    await mailbox.delivered(await mailbox.claim())
    assert await state_of(database, job_id) == ("delivered", 1, 0, None)
    clock.now_s += LEASE_S
    assert await mailbox.claim() is None


async def test_one_whose_gateway_is_lost_is_due_again(mailbox, end_job, clock):
    job_id = await end_job()
    await mailbox.claim()
    clock.now_s += LEASE_S - 1
    assert await mailbox.claim() is None
    clock.now_s += 1
    letter = await mailbox.claim()
    assert letter.job_id == job_id
    assert (letter.attempt, letter.num_failed, letter.num_lost) == (2, 0, 1)


async def test_one_that_is_put_off_is_due_later(mailbox, end_job, clock):
    await end_job()
    await mailbox.put_off(await mailbox.claim(), 30)
    clock.now_s += 29
    assert await mailbox.claim() is None
    clock.now_s += 1
    letter = await mailbox.claim()
    assert (letter.attempt, letter.num_failed, letter.num_lost) == (2, 1, 0)


async def test_one_that_is_given_back_is_due_at_once(mailbox, end_job):
    await end_job()
    await mailbox.give_back(await mailbox.claim())
    letter = await mailbox.claim()
    assert (letter.attempt, letter.num_failed, letter.num_lost) == (1, 0, 0)


async def test_one_that_is_given_up_is_due_no_more(mailbox, database, end_job, clock):
    job_id = await end_job()
    await mailbox.give_up(await mailbox.claim())
    assert await state_of(database, job_id) == ("given up", 1, 0, None)
    clock.now_s += 1000
    assert await mailbox.claim() is None


async def test_a_late_postman_changes_nothing_but_by_success(mailbox, database, end_job, clock):
    job_id = await end_job()
    late = await mailbox.claim()
    clock.now_s += LEASE_S
    letter = await mailbox.claim()
    before = await state_of(database, job_id)
    await mailbox.put_off(late, 0)
    await mailbox.give_back(late)
    await mailbox.give_up(late)
    assert await state_of(database, job_id) == before
    await mailbox.delivered(late)
    await mailbox.put_off(letter, 1)
    await mailbox.give_up(letter)
    assert await state_of(database, job_id) == ("delivered", 2, 0, None)


async def test_the_longest_due_is_first_but_of_busy_owners(mailbox, end_job, clock):
    first = await end_job("anna")
    clock.now_s += 1
    second = await end_job("ben")
    clock.now_s += 1
    assert (await mailbox.claim({"anna", "carl"})).job_id == second
    assert await mailbox.claim(["anna"]) is None
    assert (await mailbox.claim()).job_id == first


async def test_one_postman_wins(mailbox, end_job):
    for _ in range(10):
        await end_job()
    claims = await asyncio.gather(*(mailbox.claim() for _ in range(20)))
    won = [letter.job_id for letter in claims if letter is not None]
    while (letter := await mailbox.claim()) is not None:
        won.append(letter.job_id)
    assert len(won) == len(set(won)) == 10


async def test_a_job_is_kept_until_it_was_told_of(store, mailbox, end_job, clock):
    job_id = await end_job()
    clock.now_s += KEEP_S
    assert await store.find("anna", job_id) is None
    assert await store.expired(10) == ()
    await store.remove(job_id)
    letter = await mailbox.claim()
    assert (letter.job_id, letter.job.status) == (job_id, "ready")
    await mailbox.delivered(letter)
    assert await store.expired(10) == (job_id,)
    await store.remove(job_id)
    assert await store.expired(10) == ()


async def test_what_is_due_is_in_an_index(mailbox, database, end_job):
    await end_job()
    query = "SELECT job_id FROM flux_jobs WHERE webhook_due_at_s <= 5"
    async with database.connect() as connection:
        if database.is_sqlite:
            plan = await connection.execute(text(f"EXPLAIN QUERY PLAN {query}"))
        else:
            # A table of one row is read whole otherwise.
            await connection.execute(text("SET enable_seqscan = off"))
            plan = await connection.execute(text(f"EXPLAIN {query}"))
        assert "flux_jobs_webhook_due_at_s" in str(plan.all())


async def test_errors_of_the_database_tell_no_secrets(store, database, offer):
    async with database.connect() as connection:
        await connection.execute(text("ALTER TABLE flux_jobs RENAME TO elsewhere"))
    wanted = offer(webhook=WEBHOOK)
    with pytest.raises((StoreLost, ProgrammingError)) as raised:
        await store.accept(wanted, pack(wanted.request).row, True)
    assert "flux_jobs" in str(raised.value)
    assert "s3cr3t" not in str(raised.value) and "token" not in str(raised.value)


def test_secrets_are_not_printed():
    assert "token" not in repr(WEBHOOK) and "s3cr3t" not in repr(WEBHOOK)
