"""Lists of jobs: an owner's pages, the caller's own words, and who is before whom."""

import pytest
from sqlalchemy import text

from flux_ray.jobs.job import JobResult, StoredImage
from flux_ray.jobs.serialization import pack
from flux_ray.request import QueuePosition
from tests.jobs.conftest import KEEP_S

RESULT = JobResult((StoredImage("name", 7, 3, "0" * 64),), {})


async def accept(store, offer, is_whole=True):
    return await store.accept(offer, pack(offer.request).row, is_whole)


async def accept_many(store, offer, clock, num_jobs, pause_s=1.0, **rest):
    jobs = []
    for seed in range(num_jobs):
        jobs.append(await accept(store, offer(seed, **rest)))
        clock.now_s += pause_s
    return jobs


# Jobs of one moment too: their ids tell them apart.
@pytest.mark.parametrize("pause_s", [1.0, 0.0])
async def test_pages_hold_every_job_once_newest_first(store, offer, clock, pause_s):
    jobs = await accept_many(store, offer, clock, 7, pause_s)
    await accept(store, offer(owner="ben"))
    await accept(store, offer(), is_whole=False)
    clock.now_s += 1
    found, before = [], None
    while page := await store.list("anna", limit=3, before=before):
        found += page
        before = page[-1].place
        # Newer ones move nobody.
        await accept(store, offer())
    assert {job.job_id for job in found} == {job.job_id for job in jobs}
    assert [job.place for job in found] == sorted((job.place for job in jobs), reverse=True)


async def test_a_page_after_a_job_that_is_gone_goes_on_where_it_was(store, offer, clock):
    jobs = await accept_many(store, offer, clock, 3)
    await store.finish(await store.claim("w"), RESULT)
    clock.now_s += KEEP_S
    await store.remove(jobs[0].job_id)
    assert await store.list("anna", limit=9, before=jobs[0].place) == ()
    page = await store.list("anna", limit=9, before=jobs[2].place)
    assert [job.job_id for job in page] == [jobs[1].job_id]


async def test_a_list_may_be_of_one_state(store, offer, clock):
    jobs = await accept_many(store, offer, clock, 4)
    await store.finish(await store.claim("w"), RESULT)
    await store.claim("w")
    ids = {
        state: [job.job_id for job in await store.list("anna", limit=9, state=state)]
        for state in ("ready", "running", "pending", "failed")
    }
    assert ids == {
        "ready": [jobs[0].job_id],
        "running": [jobs[1].job_id],
        "pending": [jobs[3].job_id, jobs[2].job_id],
        "failed": [],
    }


async def test_an_expired_job_is_in_no_list(store, offer, clock):
    await accept(store, offer())
    await store.finish(await store.claim("w"), RESULT)
    clock.now_s += KEEP_S
    assert await store.list("anna", limit=9) == ()


async def test_a_list_is_read_from_its_index(database, store, offer):
    if not database.is_sqlite:
        pytest.skip("PostgreSQL reads a small table whole")
    query = "SELECT * FROM flux_jobs WHERE owner = 'anna' AND (created_at_s, job_id) < (5, 'x')"
    order = "ORDER BY created_at_s DESC, job_id DESC LIMIT 5"
    async with database.connect() as connection:
        plan = await connection.execute(text(f"EXPLAIN QUERY PLAN {query} {order}"))
        steps = [row.detail for row in plan]
    assert len(steps) == 1 and "USING INDEX flux_jobs_listed" in steps[0]


async def test_the_callers_own_words_come_back(store, offer):
    job = await accept(store, offer(metadata={"album": "“summer”"}, memo={"cost": 1}))
    assert (job.metadata, job.memo) == ({"album": "“summer”"}, {"cost": 1})
    assert (await store.find("anna", job.job_id)).metadata == {"album": "“summer”"}
    [listed] = await store.list("anna", limit=1)
    assert listed.metadata == {"album": "“summer”"}


async def test_a_job_without_such_words_has_none(store, database, offer):
    job = await accept(store, offer())
    assert job.metadata == {}
    async with database.connect() as connection:
        # As a gateway of an earlier release leaves it.
        await connection.execute(text("UPDATE flux_jobs SET metadata = NULL"))
    assert (await store.find("anna", job.job_id)).metadata == {}


async def test_a_worker_tells_where_it_stands_in_the_queue(store, offer):
    job = await accept(store, offer())
    lease = await store.claim("w")
    assert await store.beat(lease, None, QueuePosition(3, 12.5))
    assert (await store.find("anna", job.job_id)).standing == QueuePosition(3, 12.5)
    assert await store.beat(lease, None, QueuePosition(0, None))
    assert (await store.find("anna", job.job_id)).standing == QueuePosition(0, None)
    assert await store.beat(lease, 0.1)
    assert (await store.find("anna", job.job_id)).standing is None


async def test_who_waits_no_more_stands_nowhere(store, offer):
    job = await accept(store, offer())

    async def tell():
        lease = await store.claim("w")
        assert await store.beat(lease, None, QueuePosition(3, 12.5))
        return lease

    await store.give_back(await tell())
    assert (await store.find("anna", job.job_id)).standing is None
    await store.finish(await tell(), RESULT)
    assert (await store.find("anna", job.job_id)).standing is None


async def test_a_waiting_job_knows_who_is_before_it(store, offer, clock):
    jobs = await accept_many(store, offer, clock, 3)
    assert [await store.position_of(job.job_id) for job in jobs] == [0, 1, 2]
    lease = await store.claim("w")
    assert [await store.position_of(job.job_id) for job in jobs] == [None, 0, 1]
    await store.give_back(lease, after_s=5)
    assert [await store.position_of(job.job_id) for job in jobs] == [2, 0, 1]
    await store.cancel("anna", jobs[1].job_id)
    assert [await store.position_of(job.job_id) for job in jobs] == [1, None, 0]
    assert await store.position_of("no such job") is None
