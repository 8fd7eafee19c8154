"""The numbers of jobs and webhooks that operators watch."""

from flux_ray.jobs.census import take_census
from flux_ray.jobs.job import JobResult
from flux_ray.jobs.serialization import pack


async def accept(store, offer, **more):
    return await store.accept(offer, pack(offer.request).row, True)


async def test_jobs_are_counted_by_tier_and_state(database, store, offer, clock):
    for seed in range(3):
        await accept(store, offer(seed))
        clock.now_s += 5
    await store.finish(await store.claim("w"), JobResult((), {}))
    await store.claim("w")
    census = await take_census(database)
    assert census.jobs == {("tiny", state): 1 for state in ("pending", "running", "ready")}
    assert census.oldest_s == {"tiny": 5.0}, "since the only one that waits was submitted"
    assert census.webhooks == {}


async def test_an_empty_database_has_none(database):
    assert await take_census(database) == ({}, {}, {})
