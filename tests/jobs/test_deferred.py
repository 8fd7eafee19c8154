"""References of a job are in memory from its grant on, not while it waits for one."""

import asyncio
import json
import threading
from dataclasses import replace

import pytest

from flux_ray.config.gateway import Limits
from flux_ray.errors import ResultsLost
from flux_ray.gateway import jobs as job_loading
from flux_ray.gateway.jobs import within_budget
from flux_ray.gateway.memory_budget import MemoryBudget
from flux_ray.jobs import attempt, serialization
from flux_ray.jobs.attempt import Attempt, RetryLater, WorkerContext, outcome_of
from flux_ray.jobs.database import Database
from flux_ray.jobs.serialization import defer, pack, unpack
from flux_ray.jobs.service import accept
from flux_ray.jobs.store import Store
from flux_ray.request import DeferredRequest, ImageRequest, Mask, RgbImage, loaded
from tests.jobs.painter import image_for, paint

RED, BLUE = RgbImage(3, 2, b"\xff\0\0" * 6), RgbImage(2, 2, b"\0\0\xff" * 4)
REQUEST = ImageRequest("r", "tiny", "a ring", 64, 48, 4, 1.0, 7, references=(RED, BLUE))
MASKED = replace(REQUEST, mask=Mask(3, 2, b"\xff\0\0\xff\0\0"))


@pytest.fixture
async def store(database_url):
    database = Database(database_url)
    await database.create()
    yield Store(database, lease_s=30, keep_s=100)
    await database.close()


async def never() -> ImageRequest:
    raise AssertionError("its pixels were asked for")


def row_of(request: ImageRequest) -> dict:
    return json.loads(json.dumps(pack(request).row))


@pytest.mark.parametrize("request_", [REQUEST, MASKED], ids=["references", "mask"])
def test_a_deferred_request_has_the_names_and_sizes_of_the_whole_one(request_):
    deferred = defer(row_of(request_), "r", never)
    assert deferred.references_name == request_.references_name
    assert deferred.reference_sizes == request_.reference_sizes
    assert (deferred.mask is None) == (request_.mask is None)
    assert all(each.rgb == b"" for each in deferred.references)


def test_a_row_from_before_digests_is_read_and_is_like_no_other():
    row, packed = row_of(REQUEST), pack(REQUEST)
    for part in row["references"]:
        del part["digest"]
    assert unpack(row, packed.blobs, "r") == REQUEST
    names = {defer(row, f"job {n}", never).references_name for n in range(3)}
    assert len(names | {REQUEST.references_name}) == 4


def test_other_pixels_than_those_of_the_row_are_refused():
    other = pack(replace(REQUEST, references=(RgbImage(3, 2, b"\0" * 18), BLUE)))
    with pytest.raises(ValueError, match="stored reference image is another one"):
        unpack(row_of(REQUEST), other.blobs, "r")


async def test_they_are_read_when_it_is_the_jobs_turn(store, folder, offer, monkeypatch):
    wanted, reads, reading = offer(references=(RED, BLUE)), [], folder.read_references

    async def read(*args):
        reads.append(args)
        return await reading(*args)

    monkeypatch.setattr(folder, "read_references", read)

    async def generate(job, request):
        assert isinstance(request, DeferredRequest)
        assert reads == []
        return await paint(job, request)

    job = await accept(store, folder, wanted)
    await Attempt(await store.claim("worker"), WorkerContext(store, folder, generate)).run()
    ready = await store.find("anna", job.job_id)
    assert len(reads) == 1
    [image] = ready.result.images
    assert await folder.read_image(image) == image_for(wanted.request, 7)


async def test_a_store_that_is_away_gives_the_turn_back_and_costs_nothing(
    store, folder, offer, monkeypatch
):
    async def hang(*args):
        await asyncio.Event().wait()

    monkeypatch.setattr(folder, "read_references", hang)
    monkeypatch.setattr(attempt, "LOAD_S", 0.01)
    seen = []

    async def generate(job, request):
        try:
            return await paint(job, request)
        except ResultsLost as error:
            seen.append(error)
            raise

    job = await accept(store, folder, offer(references=(RED,)))
    await Attempt(await store.claim("worker"), WorkerContext(store, folder, generate)).run()
    waiting = await store.find("anna", job.job_id)
    assert (waiting.status, waiting.num_lost) == ("pending", 0)
    assert outcome_of(seen[0], 0) == RetryLater(5.0, is_lost=False)


async def test_packing_and_unpacking_are_never_on_the_event_loop(store, folder, offer, monkeypatch):
    threads: list[threading.Thread] = []

    def watched(call):
        def watch(*args, **rest):
            threads.append(threading.current_thread())
            return call(*args, **rest)

        return watch

    monkeypatch.setattr("flux_ray.jobs.service.compress", watched(serialization.compress))
    monkeypatch.setattr(serialization, "set_apart", watched(serialization.set_apart))
    monkeypatch.setattr(serialization, "image_of", watched(serialization.image_of))
    monkeypatch.setattr("hashlib.sha256", watched(__import__("hashlib").sha256))
    await accept(store, folder, offer(references=(RED, BLUE)))
    await Attempt(await store.claim("worker"), WorkerContext(store, folder, paint)).run()
    # The painter's own hash is made here.
    ours = [each for each in threads if each is not threading.main_thread()]
    assert len(threads) - len(ours) == 1
    assert len(ours) >= 2 + 2 + 2 + 1


LIMITS = Limits(max_held_bytes=100)


@pytest.fixture
def held(monkeypatch) -> MemoryBudget:
    """A budget of which nobody else holds anything."""
    held = MemoryBudget()
    monkeypatch.setattr(job_loading, "MEMORY", held)
    return held


async def test_a_job_waits_for_room_and_holds_it_while_its_pixels_are_there(held):
    row, packed = row_of(REQUEST), pack(REQUEST)

    async def load() -> ImageRequest:
        return unpack(row, packed.blobs, "r")

    share = held.share(1000)
    share.grow(LIMITS.max_kept_bytes)
    request = within_budget(defer(row, "r", load), LIMITS)
    loading = asyncio.create_task(loaded(request))
    await asyncio.sleep(0)
    assert not loading.done()
    share.release()
    whole = await loading
    assert whole == REQUEST
    assert held.num_bytes == 2 * 3 * (6 + 4)
    del whole, loading
    # The loop lets go of the task that it woke us for.
    await asyncio.sleep(0)
    assert held.num_bytes == 0


@pytest.mark.parametrize("error", [ResultsLost("away"), asyncio.CancelledError()])
async def test_a_job_that_cannot_be_loaded_holds_nothing(held, error):
    async def load() -> ImageRequest:
        raise error

    with pytest.raises(type(error)):
        await loaded(within_budget(defer(row_of(MASKED), "r", load), LIMITS))
    assert held.num_bytes == 0


async def test_a_job_without_references_waits_for_no_room(held):
    bare = replace(REQUEST, references=())
    held.share(1000).grow(1000)
    deferred = defer(row_of(bare), "r", never)
    assert within_budget(deferred, LIMITS) is deferred
