"""Slots of a worker: each tier has its own, and an owner leaves some of them to others."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from flux_ray.jobs.attempt import WorkerContext
from flux_ray.jobs.job import Job
from flux_ray.jobs.service import accept
from flux_ray.jobs.store import Store
from flux_ray.jobs.worker import Worker
from flux_ray.request import ImageRequest, ImageResult
from tests.jobs.painter import paint
from tests.jobs.waiting import wait_until


class Cards:
    """Those of klein draw at once; those of dev have all to wait."""

    def __init__(self) -> None:
        self.waiting: Counter[str] = Counter()

    async def generate(self, job: Job, request: ImageRequest) -> ImageResult:
        if job.tier == "dev":
            self.waiting[job.owner] += 1
            await asyncio.Event().wait()
        return await paint(job, request)


@pytest.fixture
def cards() -> Cards:
    return Cards()


@pytest.fixture
async def worker(store, folder, cards):
    worker = Worker(
        WorkerContext(store, folder, cards.generate), 4, poll_s=0.02, tiers=("dev", "klein")
    )
    worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
def hand_in(store, folder, offer, worker):
    async def accept_one(tier: str, owner: str) -> Job:
        wanted = offer(owner=owner)
        wanted = replace(wanted, request=replace(wanted.request, tier=tier))
        job = await accept(store, folder, wanted)
        worker.wake()
        return job

    return accept_one


async def are_ready(store: Store, jobs: list[Job]) -> bool:
    found = [await store.find(job.owner, job.job_id) for job in jobs]
    return all(job.status == "ready" for job in found)


async def test_a_tier_without_room_keeps_no_other_tier_waiting(store, cards, worker, hand_in):
    for owner in ("anna", "ben") * 6:
        await hand_in("dev", owner)

    async def is_full() -> bool:
        return cards.waiting.total() == 4

    await wait_until(is_full)
    # More than there are slots, of an owner who waits for dev and of another.
    generated = [await hand_in("klein", owner) for owner in ("anna", "carl") * 4]
    await wait_until(lambda: are_ready(store, generated))
    assert cards.waiting.total() == 4, "no more of a tier than it has slots"


async def test_an_owner_leaves_slots_of_each_tier_to_others(store, cards, worker, hand_in):
    for _ in range(6):
        await hand_in("dev", "anna")
    generated = [await hand_in("klein", "anna") for _ in range(6)]
    await wait_until(lambda: are_ready(store, generated))
    await hand_in("dev", "ben")

    async def is_full() -> bool:
        return cards.waiting == {"anna": 3, "ben": 1}

    await wait_until(is_full)
