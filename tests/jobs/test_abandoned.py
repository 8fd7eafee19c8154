"""Jobs that no worker takes: their callers are told in the end, and no other job is touched."""

import pytest

from flux_ray.jobs.cleanup import NOT_SERVED, Abandoned
from flux_ray.jobs.serialization import pack
from flux_ray.jobs.statements import Wanted
from flux_ray.jobs.store import Store
from flux_ray.request import PROTOCOL
from tests.jobs.conftest import KEEP_S, LEASE_S


async def accept(store, offer):
    return await store.accept(offer, pack(offer.request).row, is_whole=True)


@pytest.fixture
def newer(database, clock) -> Store:
    return Store(database, LEASE_S, KEEP_S, clock, protocol=PROTOCOL + 1)


@pytest.fixture
def wait(database, store, clock):
    """`await wait(tiers, unread, 50)`: a gateway of these tiers looks for so long."""

    async def look_on(tiers, seconds, unread=(), meanwhile=None):
        abandoned = Abandoned(database, store, tiers, KEEP_S, clock)
        await abandoned.end_all(unread)
        for _ in range(16):
            clock.now_s += seconds / 16
            if meanwhile is not None:
                await meanwhile()
            await abandoned.end_all(unread)

    return look_on


async def test_a_job_of_a_tier_that_nobody_serves_is_told_of(store, offer, wait, serve_log):
    job = await accept(store, offer())
    await wait({"other"}, 0.9 * KEEP_S)
    assert (await store.find("anna", job.job_id)).status == "pending"
    await wait({"other"}, KEEP_S)
    found = await store.find("anna", job.job_id)
    assert (found.status, found.failure, found.num_lost) == ("failed", NOT_SERVED, 0)
    assert [job.job_id in line for line in serve_log.messages] == [True]


async def test_a_job_of_a_release_that_nobody_runs_is_told_of(store, newer, offer, wait):
    job = await accept(newer, offer())
    await wait({"tiny"}, KEEP_S)
    assert (await store.find("anna", job.job_id)).failure == NOT_SERVED


async def test_a_job_that_it_could_not_read_is_told_of_if_nobody_else_can(store, offer, wait):
    job = await accept(store, offer())
    await wait({"tiny"}, KEEP_S, unread={job.job_id})
    assert (await store.find("anna", job.job_id)).failure == NOT_SERVED


async def test_a_job_that_this_gateway_serves_waits_for_ever(store, offer, wait):
    job = await accept(store, offer())
    await wait({"tiny"}, 5 * KEEP_S)
    await wait(None, 5 * KEEP_S)
    assert (await store.find("anna", job.job_id)).status == "pending"


async def test_a_job_waits_while_others_of_its_kind_are_begun(store, newer, offer, clock, wait):
    jobs = [await accept(newer, offer(seed)) for seed in range(40)]

    async def work() -> None:
        lease = await newer.claim("new")
        await newer.give_back(lease, after_s=10 * KEEP_S)

    await wait({"tiny"}, 3 * KEEP_S, meanwhile=work)
    statuses = {(await store.find("anna", job.job_id)).status for job in jobs}
    assert statuses == {"pending"}


async def test_a_cluster_that_was_off_has_lost_nothing(store, newer, offer, clock, wait):
    job = await accept(newer, offer())
    clock.now_s += 100 * KEEP_S
    await wait({"other"}, 0.5 * KEEP_S)
    assert (await newer.claim("new", Wanted())).job_id == job.job_id
