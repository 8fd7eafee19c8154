"""The store: who gets a job, who may end it, who finds it; on SQLite and PostgreSQL alike."""

import asyncio
import dataclasses
import sqlite3
import time
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text

from flux_ray.errors import KeyReused, RateLimited, StoreLost
from flux_ray.jobs.database import Database
from flux_ray.jobs.job import Idempotency, Job, JobFailure, JobResult, StoredImage, Webhook
from flux_ray.jobs.serialization import pack, unpack
from flux_ray.jobs.statements import ARRIVAL_S, Wanted
from flux_ray.jobs.store import Store
from tests.jobs.conftest import KEEP_S, LEASE_S

RESULT = JobResult((StoredImage("name", 7, 3, "0" * 64),), {"denoise_s": 0.5}, ("a warning",))
FAILURE = JobFailure("content_refused", "no")


async def accept(store, offer, is_whole=True):
    return await store.accept(offer, pack(offer.request).row, is_whole)


@pytest.mark.parametrize("seed", [0, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
async def test_an_accepted_job_is_found_as_it_was_offered(store, offer, clock, seed):
    accepted = await accept(store, offer(seed=seed, memo={"cost": 1.5}))
    found = await store.find("anna", accepted.job_id)
    assert found == accepted
    assert (found.status, found.seed, found.tier, found.progress) == ("pending", seed, "tiny", 0)
    assert (found.created_at_s, found.memo) == (clock.now_s, {"cost": 1.5})
    request = unpack(found.packed, (), "r")
    assert request == offer(seed=seed).request


@pytest.mark.parametrize("prompt", ["\0", "\ud800", "'; DROP TABLE flux_jobs; --", "🖼" * 32_000])
async def test_any_words_are_kept(store, offer, prompt):
    wanted = offer()
    wanted = dataclasses.replace(wanted, request=dataclasses.replace(wanted.request, prompt=prompt))
    job = await accept(store, wanted)
    assert (await store.find("anna", job.job_id)).packed["prompt"] == prompt
    assert (await store.claim("w")).job.packed["prompt"] == prompt


async def test_other_peoples_jobs_are_absent(store, offer):
    job = await accept(store, offer())
    assert await store.find("ben", job.job_id) is None
    assert await store.find("anna", "no such job") is None
    assert not await store.cancel("ben", job.job_id)
    assert (await store.find("anna", job.job_id)).status == "pending"


async def test_jobs_are_claimed_in_order_of_their_coming(store, offer, clock):
    jobs = []
    for seed in range(3):
        jobs.append(await accept(store, offer(seed)))
        clock.now_s += 1
    leases = [await store.claim("w") for _ in jobs]
    assert [lease.job_id for lease in leases] == [job.job_id for job in jobs]
    assert await store.claim("w") is None


async def test_busy_owners_wait_for_others(store, offer, clock):
    first = await accept(store, offer(owner="anna"))
    clock.now_s += 1
    second = await accept(store, offer(owner="ben"))
    busy = frozenset({("tiny", "anna"), ("tiny", "carl"), ("other", "ben")})
    assert (await store.claim("w", Wanted(busy=busy))).job_id == second.job_id
    assert await store.claim("w", Wanted(busy=busy)) is None
    assert (await store.claim("w")).job_id == first.job_id


async def test_one_claimer_wins(store, offer):
    for seed in range(20):
        await accept(store, offer(seed))
    claims = await asyncio.gather(*(store.claim(f"worker {n}") for n in range(40)))
    won = [lease.job_id for lease in claims if lease is not None]
    # On PostgreSQL one that finds a row being claimed may find nothing else to claim.
    while (lease := await store.claim("the last")) is not None:
        won.append(lease.job_id)
    assert len(won) == len(set(won)) == 20


async def test_a_claimed_job_is_running(store, offer, clock):
    job = await accept(store, offer())
    clock.now_s += 5
    await store.claim("w")
    found = await store.find("anna", job.job_id)
    assert (found.status, found.attempt, found.started_at_s) == ("running", 1, clock.now_s)


async def test_a_lease_that_ran_out_is_claimed_again(store, offer, pass_s):
    await accept(store, offer())
    first = await store.claim("lost")
    await pass_s(LEASE_S - 1)
    assert await store.claim("w") is None
    await pass_s(1)
    second = await store.claim("w")
    assert (second.job_id, second.attempt, second.job.num_lost) == (first.job_id, 2, 1)


async def test_a_beat_keeps_the_lease(store, offer, pass_s):
    job = await accept(store, offer())
    lease = await store.claim("w")
    for _ in range(3):
        await pass_s(LEASE_S - 1)
        assert await store.beat(lease, progress=0.5)
        assert await store.claim("other") is None
    assert (await store.find("anna", job.job_id)).progress == 0.5
    assert await store.beat(lease)
    assert (await store.find("anna", job.job_id)).progress == 0.5


async def test_previews_are_there_while_their_lease_is(store, offer, pass_s):
    job = await accept(store, offer())
    late = await store.claim("late")
    assert await store.show(late, RESULT.images)
    assert (await store.find("anna", job.job_id)).preview == RESULT.images[0]
    await pass_s(LEASE_S)
    lease = await store.claim("w")
    assert not await store.show(late, RESULT.images)
    assert (await store.find("anna", job.job_id)).result is None
    assert await store.show(lease, RESULT.images)
    assert await store.fail(lease, FAILURE)
    assert (await store.find("anna", job.job_id)).result is None
    assert not await store.show(lease, RESULT.images)


async def test_a_late_worker_ends_nothing(store, offer, pass_s):
    job = await accept(store, offer())
    late = await store.claim("late")
    await pass_s(LEASE_S)
    lease = await store.claim("w")
    before = await store.find("anna", job.job_id)
    assert not await store.beat(late, 0.9)
    assert not await store.finish(late, RESULT)
    assert not await store.fail(late, FAILURE)
    assert not await store.give_back(late)
    assert await store.find("anna", job.job_id) == before
    assert await store.finish(lease, RESULT)
    ready = await store.find("anna", job.job_id)
    assert not await store.finish(late, dataclasses.replace(RESULT, warnings=()))
    assert not await store.finish(lease, dataclasses.replace(RESULT, warnings=()))
    assert not await store.fail(lease, FAILURE)
    assert await store.find("anna", job.job_id) == ready


async def test_a_lease_that_nobody_took_still_finishes(store, offer, pass_s):
    job = await accept(store, offer())
    lease = await store.claim("slow")
    await pass_s(3 * LEASE_S)
    assert await store.finish(lease, RESULT)
    assert (await store.find("anna", job.job_id)).status == "ready"
    assert await store.claim("w") is None


async def test_a_finished_job_tells_its_result(store, offer, clock):
    job = await accept(store, offer())
    lease = await store.claim("w")
    clock.now_s += 3
    assert await store.finish(lease, RESULT)
    found = await store.find("anna", job.job_id)
    assert (found.status, found.progress, found.result) == ("ready", 1.0, RESULT)
    assert found.finished_at_s == clock.now_s
    assert found.expires_at_s == clock.now_s + KEEP_S


@pytest.mark.parametrize("end", ["failed", "refused"])
async def test_a_failed_job_says_why(store, offer, end):
    job = await accept(store, offer())
    assert await store.fail(await store.claim("w"), FAILURE, end)
    found = await store.find("anna", job.job_id)
    assert (found.status, found.failure, found.result) == (end, FAILURE, None)
    assert await store.claim("w") is None


async def test_a_job_that_was_given_back_waits(store, offer, clock):
    await accept(store, offer())
    assert await store.give_back(await store.claim("w"))
    lease = await store.claim("w")
    assert (lease.attempt, lease.job.num_lost) == (2, 0)
    assert await store.give_back(lease, after_s=5, is_lost=True)
    assert await store.claim("w") is None
    clock.now_s += 5
    assert (await store.claim("w")).job.num_lost == 1


async def test_a_waiting_job_is_cancelled(store, offer):
    job = await accept(store, offer())
    assert await store.cancel("anna", job.job_id)
    assert await store.claim("w") is None
    assert (await store.find("anna", job.job_id)).status == "cancelled"
    assert not await store.cancel("anna", job.job_id)


async def test_a_running_job_is_cancelled(store, offer):
    job = await accept(store, offer())
    lease = await store.claim("w")
    assert await store.cancel("anna", job.job_id)
    assert not await store.beat(lease)
    assert not await store.finish(lease, RESULT)
    assert not await store.give_back(lease)
    assert (await store.find("anna", job.job_id)).status == "cancelled"


async def test_an_ended_job_is_not_cancelled(store, offer):
    job = await accept(store, offer())
    await store.finish(await store.claim("w"), RESULT)
    assert not await store.cancel("anna", job.job_id)
    assert (await store.find("anna", job.job_id)).status == "ready"


async def test_the_same_key_is_the_same_job(store, offer):
    key = Idempotency("key", "words")
    jobs = await asyncio.gather(
        *(accept(store, offer(seed, idempotency=key)) for seed in range(10))
    )
    assert len({(job.job_id, job.seed) for job in jobs}) == 1
    other = await accept(store, offer(owner="ben", idempotency=key))
    assert other.job_id != jobs[0].job_id
    with pytest.raises(KeyReused):
        await accept(store, offer(idempotency=Idempotency("key", "other words")))
    assert await store.num_active("anna") == 1


@pytest.mark.parametrize("max_active", [None, 1])
async def test_a_key_is_free_when_its_job_has_expired(store, offer, clock, max_active):
    first = await accept(store, offer(idempotency=Idempotency("key", "words")))
    await store.finish(await store.claim("w"), RESULT)
    clock.now_s += KEEP_S
    again = offer(idempotency=Idempotency("key", "other words"), max_active=max_active)
    second = await accept(store, again)
    assert second.job_id != first.job_id


async def test_a_job_that_is_not_whole_is_nobodys(store, offer, clock):
    job = await accept(store, offer(), is_whole=False)
    assert job.status == "arriving"
    assert await store.claim("w") is None
    assert await store.find("anna", job.job_id) is None
    assert await store.num_active("anna") == 1
    assert (await store.admit(job.job_id)).status == "pending"
    # Another gateway was at it too.
    assert (await store.admit(job.job_id)).status == "pending"
    assert (await store.claim("w")).job_id == job.job_id


async def test_a_job_that_did_not_come_in_time_never_comes(store, offer, clock):
    job = await accept(store, offer(), is_whole=False)
    clock.now_s += ARRIVAL_S
    assert await store.admit(job.job_id) is None
    assert await store.num_active("anna") == 0
    assert await store.expired(10) == (job.job_id,)


async def test_an_expired_job_is_absent_and_then_removed(store, offer, clock):
    job = await accept(store, offer())
    await store.finish(await store.claim("w"), RESULT)
    await accept(store, offer())
    await store.remove(job.job_id)
    assert await store.find("anna", job.job_id) is not None
    clock.now_s += KEEP_S
    assert await store.find("anna", job.job_id) is None
    assert await store.expired(10) == (job.job_id,)
    await store.remove(job.job_id)
    assert await store.expired(10) == ()
    assert await store.num_active("anna") == 1


async def test_an_owners_jobs_are_counted_until_they_end(store, offer, clock):
    for _ in range(3):
        await accept(store, offer())
    # Of two at one time either is claimed first.
    clock.now_s += 1
    await accept(store, offer(owner="ben"))
    await store.finish(await store.claim("w"), RESULT)
    await store.claim("w")
    assert await store.num_active("anna") == 2


@asynccontextmanager
async def all_at_once(database):
    """Nobody writes before its end: then everybody does."""
    async with database.connect() as connection:
        if database.is_sqlite:
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            await connection.exec_driver_sql("BEGIN")
            await connection.exec_driver_sql("LOCK TABLE flux_jobs IN SHARE MODE")
        yield
        await connection.exec_driver_sql("COMMIT")


async def test_an_owner_has_no_more_jobs_than_it_may(database_url, offer):
    databases = [Database(database_url) for _ in range(4)]
    await asyncio.gather(*(database.create() for database in databases))
    gateways = [Store(database, LEASE_S, KEEP_S) for database in databases]
    wanted = [offer(seed, max_active=3) for seed in range(20)]
    async with all_at_once(databases[0]):
        accepting = [
            asyncio.create_task(accept(gateways[each.request.seed % 4], each)) for each in wanted
        ]
        await asyncio.sleep(0.5)
    outcomes = await asyncio.gather(*accepting, return_exceptions=True)
    refused = [each for each in outcomes if isinstance(each, RateLimited)]
    assert (len(refused), len(outcomes)) == (17, 20)
    assert {(each.limit, each.left, each.status) for each in refused} == {(3, 0, 429)}
    assert await gateways[0].num_active("anna") == 3
    await accept(gateways[0], offer(owner="ben", max_active=1))
    job = next(each for each in outcomes if isinstance(each, Job))
    await gateways[1].cancel("anna", job.job_id)
    again = offer(idempotency=Idempotency("key", "words"), max_active=3)
    known = await accept(gateways[0], again)
    assert await accept(gateways[1], again) == known, "it is one of the three"
    with pytest.raises(RateLimited):
        await accept(gateways[1], offer(idempotency=Idempotency("other", "words"), max_active=3))
    await asyncio.gather(*(database.close() for database in databases))


async def test_a_webhook_is_kept_for_its_time(store, database, offer):
    await accept(store, offer(webhook=Webhook("https://example.org/hook", "secret")))
    columns = "webhook_url, webhook_secret, webhook_state, webhook_attempt"
    async with database.connect() as connection:
        row = (await connection.execute(text(f"SELECT {columns} FROM flux_jobs"))).one()
    assert tuple(row) == ("https://example.org/hook", "secret", "waiting", 0)


async def test_the_databases_own_clock_counts_seconds(database_url, offer):
    database = Database(database_url)
    await database.create()
    store = Store(database, lease_s=0.2, keep_s=1)
    job = await accept(store, offer())
    assert job.created_at_s == pytest.approx(time.time(), abs=60)
    lease = await store.claim("w")
    await store.give_back(lease, after_s=0.2)
    assert await store.claim("w") is None
    await asyncio.sleep(0.25)
    assert await store.claim("w") is not None
    await database.close()


async def test_gateways_that_start_at_once_make_one_table(database_url):
    databases = [Database(database_url) for _ in range(5)]
    await asyncio.gather(*(database.create() for database in databases))
    await asyncio.gather(*(database.close() for database in databases))


async def test_who_is_cancelled_leaves_no_statement_half_done(store, offer):
    for seed in range(20):
        await accept(store, offer(seed))
    for number in range(20):
        claiming = asyncio.create_task(store.claim("gone"))
        await asyncio.sleep(number / 10_000)
        claiming.cancel()
        await asyncio.wait({claiming})
    counted = await store.num_active("anna")
    assert counted == 20


async def test_a_database_that_is_away_is_a_lost_store(tmp_path, offer):
    nowhere = Database(f"postgresql://flux@/jobs?host={tmp_path}")
    with pytest.raises(StoreLost):
        await Store(nowhere, LEASE_S, KEEP_S).claim("w")
    await nowhere.close()


async def test_a_file_that_another_process_writes_is_waited_for(tmp_path, offer):
    database = Database(f"sqlite:///{tmp_path}/jobs.sqlite3")
    await database.create()
    other = sqlite3.connect(tmp_path / "jobs.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    accepting = asyncio.create_task(accept(Store(database, LEASE_S, KEEP_S), offer()))
    await asyncio.sleep(0.2)
    assert not accepting.done()
    other.execute("COMMIT")
    other.close()
    assert (await accepting).status == "pending"
    await database.close()


@pytest.mark.parametrize("url", ["mysql://localhost/jobs", "sqlite+pysqlite:///jobs"])
def test_other_databases_are_refused(url):
    with pytest.raises(ValueError, match="neither sqlite nor postgresql"):
        Database(url)
