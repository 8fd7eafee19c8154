"""Previews of jobs: shown while they are drawn, gone at their end, and never in a job's way."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from flux_ray.errors import ResultsLost, StoreLost
from flux_ray.jobs.attempt import Attempt, Previews, WorkerContext
from flux_ray.jobs.images import ImageStore, ResultMissing, ResultTooLarge
from flux_ray.jobs.job import Lease, StoredImage
from flux_ray.jobs.serialization import unpack
from flux_ray.jobs.service import accept
from flux_ray.request import GeneratedImage
from tests.jobs.conftest import KEEP_S
from tests.jobs.painter import image_for, paint
from tests.jobs.waiting import wait_until

JOB = SimpleNamespace(job_id="j", attempt=2, packed={"encoding": {"format": "webp"}})
BEAT_S = 0.001


class FakeStores:
    """The store of jobs and that of results in one, after raising what is in `failures`."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.shown: list[tuple[StoredImage, ...]] = []
        self.removed: list[tuple[object, ...]] = []

    async def write_preview(self, job_id, attempt, number, image, form) -> StoredImage:
        if self.failures:
            raise self.failures.pop(0)
        return StoredImage(f"{job_id}/{attempt}-{number}.{form}", image.seed, len(image.data), "")

    async def show(self, lease, previews) -> bool:
        self.shown.append(previews)
        return True

    async def remove_previews(self, *of: object) -> None:
        self.removed.append(of)


def image_of(number: int) -> GeneratedImage:
    return GeneratedImage(b"preview %d" % number, 7)


async def show(stores: FakeStores, *images: GeneratedImage | None) -> None:
    """Each of them is the last one for a few beats."""
    heard = [None]
    previews = Previews(Lease(JOB), stores, stores, lambda: heard[-1])
    async with previews.shown(BEAT_S):
        for image in images:
            heard.append(image)
            await asyncio.sleep(20 * BEAT_S)


async def test_each_preview_is_shown_once_beside_those_before_it():
    stores = FakeStores()
    await show(stores, None, image_of(1), image_of(2), None)
    names = [[image.name for image in images] for images in stores.shown]
    assert names == [["j/2-0.webp"], ["j/2-0.webp", "j/2-1.webp"]]
    assert stores.removed == [("j", 2, 2, "webp")]


@pytest.mark.parametrize("error", [StoreLost("away"), ResultsLost("away"), ResultTooLarge("away")])
async def test_one_that_cannot_be_kept_is_left_out(error, serve_log):
    stores = FakeStores(error)
    await show(stores, image_of(1), image_of(2))
    assert [[image.name for image in each] for each in stores.shown] == [["j/2-1.webp"]]
    assert "job j is not previewed: away" in serve_log.text


async def test_what_cannot_be_removed_stays(monkeypatch, serve_log):
    async def refuse(*of: object) -> None:
        raise ResultsLost("away")

    stores = FakeStores()
    monkeypatch.setattr(stores, "remove_previews", refuse)
    await show(stores, image_of(1))
    assert "job j keeps its previews for now: away" in serve_log.text


async def test_a_store_that_hangs_holds_nobody_up(monkeypatch):
    async def hang(*of: object) -> StoredImage:
        await asyncio.sleep(60)

    stores = FakeStores()
    monkeypatch.setattr(stores, "write_preview", hang)
    async with asyncio.timeout(30):
        await show(stores, image_of(1))
    assert not stores.shown


class Generation:
    """Draws when it is told to, and has a preview in the meantime."""

    def __init__(self) -> None:
        self.is_asked = False
        self.may_end = asyncio.Event()

    async def generate(self, job, request):
        await self.may_end.wait()
        return await paint(job, request)

    def preview_of(self, request_id: str) -> GeneratedImage:
        self.is_asked = True
        return image_of(1)


@pytest.fixture
def begin(store, folder, offer, monkeypatch):
    """`begin(num_previews)`: an attempt at a job that asks for so many, as a task."""
    monkeypatch.setattr("flux_ray.jobs.attempt.MAX_BEAT_S", 0.01)

    async def begin(num_previews: int = 3):
        wanted = offer()
        wanted = replace(wanted, request=replace(wanted.request, num_previews=num_previews))
        await accept(store, folder, wanted)
        lease, generation = await store.claim("w"), Generation()
        workshop = WorkerContext(
            store, folder, generation.generate, preview_of=generation.preview_of
        )
        return lease, generation, asyncio.create_task(Attempt(lease, workshop).run())

    return begin


async def previewed(store, lease: Lease) -> StoredImage:
    async def is_shown() -> bool:
        return (await store.find("anna", lease.job_id)).preview is not None

    await wait_until(is_shown)
    return (await store.find("anna", lease.job_id)).preview


async def test_any_gateway_reads_a_preview_until_its_job_ends(store, database, folder, begin):
    lease, generation, attempt = await begin()
    preview = await previewed(store, lease)
    shelf = ImageStore(database, folder, KEEP_S)
    assert await shelf.read(preview.name) == b"preview 1"
    generation.may_end.set()
    await attempt
    job = await store.find("anna", lease.job_id)
    assert (job.status, job.preview) == ("ready", None)
    [image] = job.result.images
    assert await shelf.read(image.name) == image_for(unpack(job.packed, (), ""), 7)
    with pytest.raises(ResultMissing):
        await shelf.read(preview.name)
    with pytest.raises(ResultMissing):
        await folder.read_image(preview)


async def test_a_job_that_is_given_back_or_cancelled_shows_none(store, folder, begin):
    lease, _, attempt = await begin()
    await previewed(store, lease)
    attempt.cancel()
    await asyncio.wait({attempt})
    assert (await store.find("anna", lease.job_id)).result is None

    lease, _, attempt = await begin()
    preview = await previewed(store, lease)
    assert await store.cancel("anna", lease.job_id)
    await attempt
    assert (await store.find("anna", lease.job_id)).result is None
    with pytest.raises(ResultMissing):
        await folder.read_image(preview)


async def test_nothing_is_looked_for_where_none_is_asked(store, begin):
    lease, generation, attempt = await begin(num_previews=0)
    await asyncio.sleep(0.05)
    generation.may_end.set()
    await attempt
    assert (await store.find("anna", lease.job_id)).status == "ready"
    assert not generation.is_asked
