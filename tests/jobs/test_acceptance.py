"""Accepting and cleaning up: rows and images come and go together."""

import asyncio

import pytest

from flux_ray.errors import KeyReused, ResultsLost
from flux_ray.jobs import cleanup
from flux_ray.jobs.cleanup import clean_up, keep_clean
from flux_ray.jobs.job import Idempotency, JobResult
from flux_ray.jobs.serialization import pack
from flux_ray.jobs.service import accept
from flux_ray.jobs.statements import ARRIVAL_S
from flux_ray.request import GeneratedImage, RgbImage
from tests.jobs.conftest import KEEP_S
from tests.jobs.waiting import wait_until

RED = RgbImage(3, 2, b"\xff\x00\x00" * 6)


def names(tmp_path) -> set[str]:
    root = tmp_path / "results"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


async def test_references_are_there_before_the_job(store, folder, offer, tmp_path):
    job = await accept(store, folder, offer(references=(RED, RED)))
    assert job.status == "pending"
    assert names(tmp_path) == {f"{job.job_id}/reference-0", f"{job.job_id}/reference-1"}


async def test_an_offer_whose_images_were_not_kept_is_offered_again(
    store, folder, offer, monkeypatch
):
    kept = offer(references=(RED,), idempotency=Idempotency("key", "words"))

    async def refuse(*args) -> None:
        raise ResultsLost("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_references", refuse)
        with pytest.raises(ResultsLost):
            await accept(store, folder, kept)
    assert await store.claim("w") is None
    job = await accept(store, folder, kept)
    assert (await accept(store, folder, kept)).job_id == job.job_id
    assert await folder.read_references(job.job_id, 1) == pack(kept.request).blobs
    assert (await store.claim("w")).job_id == job.job_id


async def test_the_same_offer_at_many_gateways_is_one_job(store, folder, offer, tmp_path):
    same = offer(references=(RED,), idempotency=Idempotency("key", "words"))
    jobs = await asyncio.gather(*(accept(store, folder, same) for _ in range(8)))
    assert len({job.job_id for job in jobs}) == 1
    assert len(names(tmp_path)) == 1
    with pytest.raises(KeyReused):
        await accept(store, folder, offer(idempotency=Idempotency("key", "others")))


async def test_expired_jobs_go_with_their_images(store, folder, offer, clock, tmp_path):
    gone = await accept(store, folder, offer(references=(RED,)))
    lease = await store.claim("w")
    # Of an attempt that was lost.
    await folder.write_images(gone.job_id, 9, (GeneratedImage(b"late", 7),), "png")
    await store.finish(lease, JobResult((), {}))
    kept = await accept(store, folder, offer(references=(RED,)))
    assert await clean_up(store, folder) == 0
    clock.now_s += KEEP_S
    assert await clean_up(store, folder) == 1
    assert names(tmp_path) == {f"{kept.job_id}/reference-0"}
    assert await store.expired(10) == ()


async def test_what_half_arrived_is_cleaned_up(store, folder, offer, clock, tmp_path):
    job = await store.accept(offer(), pack(offer().request).row, is_whole=False)
    await folder.write_references(job.job_id, (b"one",))
    clock.now_s += ARRIVAL_S
    assert await clean_up(store, folder) == 1
    assert names(tmp_path) == set()


async def test_cleaning_goes_on_after_an_outage(store, folder, offer, clock, monkeypatch):
    job = await accept(store, folder, offer())
    await store.cancel("anna", job.job_id)
    clock.now_s += KEEP_S
    outages = [ResultsLost("away"), RuntimeError("a mistake of ours")]
    remove = folder.remove_job

    async def fail_twice(job_id: str) -> None:
        if outages:
            raise outages.pop()
        await remove(job_id)

    monkeypatch.setattr(folder, "remove_job", fail_twice)
    cleaner = asyncio.create_task(keep_clean(store, folder, period_s=0.01))

    async def is_clean() -> bool:
        return await store.expired(10) == ()

    await wait_until(is_clean)
    cleaner.cancel()
    assert outages == []


async def test_a_folder_that_stays_holds_up_no_other(store, folder, offer, clock, monkeypatch):
    jobs = [await accept(store, folder, offer()) for _ in range(5)]
    for job in jobs:
        await store.cancel("anna", job.job_id)
        clock.now_s += 1
    clock.now_s += KEEP_S
    remove = folder.remove_job

    async def fail_one(job_id: str) -> None:
        if job_id == jobs[0].job_id:
            raise ResultsLost("not permitted")
        await remove(job_id)

    monkeypatch.setattr(folder, "remove_job", fail_one)
    monkeypatch.setattr(cleanup, "EXPIRED_BATCH", 2)
    assert await clean_up(store, folder) == 4
    assert await store.expired(10) == (jobs[0].job_id,)
