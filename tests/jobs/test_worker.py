"""The worker: jobs are drawn and ended once, whatever fails, and given back when it stops."""

import asyncio

import pytest

from flux_ray.errors import BadRequest, Overloaded, ReplicaFailed, ResultsLost, StoreLost
from flux_ray.jobs import attempt as outcome
from flux_ray.jobs.attempt import WorkerContext
from flux_ray.jobs.database import Database
from flux_ray.jobs.images import Results
from flux_ray.jobs.job import Job, JobFailure
from flux_ray.jobs.service import accept
from flux_ray.jobs.store import Store
from flux_ray.jobs.worker import Worker
from flux_ray.request import ImageRequest, ImageResult, RgbImage
from tests.jobs.painter import image_for, paint
from tests.jobs.waiting import wait_until

RED = RgbImage(3, 2, b"\xff\x00\x00" * 6)
LEASE_S = 0.3


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(outcome, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(outcome, "AWAY_PAUSE_S", 0.01)


@pytest.fixture
async def store(database_url):
    """By the database's own clock."""
    database = Database(database_url)
    await database.create()
    yield Store(database, LEASE_S, keep_s=100)
    await database.close()


@pytest.fixture
async def employ(store, folder):
    """`employ(generate)`: a worker at work, stopped after the test."""
    workers = []

    def start(generate=paint, max_running=4, poll_s=0.02, **rest) -> Worker:
        workshop = WorkerContext(store, folder, generate, pause_s=0.02, **rest)
        workers.append(Worker(workshop, max_running, poll_s))
        workers[-1].start()
        return workers[-1]

    yield start
    for worker in workers:
        await worker.stop()


async def end_of(store: Store, job: Job) -> Job:
    async def has_ended() -> bool:
        return (await store.find(job.owner, job.job_id)).finished_at_s is not None

    await wait_until(has_ended)
    return await store.find(job.owner, job.job_id)


async def images_of(results: Results, job: Job) -> list[bytes]:
    return [await results.read_image(image) for image in job.result.images]


async def test_a_job_becomes_the_image_of_its_seed(store, folder, offer, employ):
    wanted = offer(seed=3, references=(RED,))
    job = await accept(store, folder, wanted)
    employ()
    ready = await end_of(store, job)
    assert (ready.status, ready.attempt) == ("ready", 1)
    assert await images_of(folder, ready) == [image_for(wanted.request, 3)]
    assert ready.result.images[0].seed == 3
    assert ready.result.stages_s["denoise_s"] == 0.0


@pytest.mark.parametrize("errors", [(), (BadRequest("too wide", "width"),)])
async def test_references_go_when_the_job_has_ended(store, folder, offer, employ, tmp_path, errors):
    job = await accept(store, folder, offer(references=(RED, RED)))
    worker = employ(failing(*errors))
    ended = await end_of(store, job)
    await worker.stop(drain_s=5)
    left = {path.name for path in (tmp_path / "results" / job.job_id).iterdir()}
    assert left == (set() if errors else {"1-0.png"})
    assert ended.status == ("failed" if errors else "ready")


async def test_references_that_stay_cost_no_image(
    store, folder, offer, employ, monkeypatch, serve_log
):
    async def refuse(job_id: str, count: int) -> None:
        raise ResultsLost("away")

    monkeypatch.setattr(folder, "remove_references", refuse)
    job = await accept(store, folder, offer(references=(RED,)))
    worker = employ()
    assert (await end_of(store, job)).status == "ready"
    await worker.stop(drain_s=5)
    assert f"job {job.job_id} keeps its reference images for now: away" in serve_log.text


async def test_one_owner_leaves_room_for_others(store, folder, offer, employ):
    async def generate(job: Job, request: ImageRequest) -> ImageResult:
        return await paint(job, request, 60 if job.owner == "anna" else 0)

    for seed in range(6):
        await accept(store, folder, offer(seed))
    worker = employ(generate, max_running=4)
    for seed in range(2):
        job = await accept(store, folder, offer(seed, owner="ben"))
        assert (await end_of(store, job)).status == "ready"
    assert worker.num_running == 3


async def test_a_worker_goes_on_after_a_mistake_of_ours(
    store, folder, offer, employ, monkeypatch, serve_log
):
    claim, mistakes = store.claim, [ValueError("a row of tomorrow"), ValueError("another")]

    async def stumble(*args):
        if mistakes:
            raise mistakes.pop(0)
        return await claim(*args)

    monkeypatch.setattr(store, "claim", stumble)
    employ()
    job = await accept(store, folder, offer())
    assert (await end_of(store, job)).status == "ready"
    assert mistakes == [] and "a row of tomorrow" in serve_log.text


async def test_a_worker_that_stops_does_not_begin_again(store, folder, monkeypatch):
    num_claims = 0

    async def stumble(*args):
        nonlocal num_claims
        num_claims += 1
        raise ValueError("a mistake")

    monkeypatch.setattr(store, "claim", stumble)
    worker = Worker(WorkerContext(store, folder, paint, pause_s=0.02), 4)
    worker.start()

    async def has_claimed() -> bool:
        return num_claims > 0

    await wait_until(has_claimed)
    await worker.stop()
    before = num_claims
    await asyncio.sleep(0.1)
    assert num_claims == before


async def test_so_many_jobs_run_at_once_and_no_more(store, folder, offer, employ):
    running, most, are_three = set[str](), 0, asyncio.Event()

    async def generate(job: object, request: ImageRequest) -> ImageResult:
        nonlocal most
        running.add(request.request_id)
        if (most := max(most, len(running))) == 3:
            are_three.set()
        await are_three.wait()
        result = await paint(job, request, 0.02)
        running.remove(request.request_id)
        return result

    jobs = [await accept(store, folder, offer(seed)) for seed in range(12)]
    employ(generate, max_running=3)
    for job in jobs:
        assert (await end_of(store, job)).status == "ready"
    assert most == 3


async def test_a_long_job_keeps_its_lease_and_tells_its_progress(store, folder, offer, employ):
    progress = {}

    async def generate(job: object, request: ImageRequest) -> ImageResult:
        progress[request.request_id] = 0.25
        return await paint(job, request, 4 * LEASE_S)

    job = await accept(store, folder, offer())
    employ(generate, progress_of=progress.get)
    employ(generate, progress_of=progress.get)

    async def is_told() -> bool:
        return (await store.find("anna", job.job_id)).progress == 0.25

    await wait_until(is_told)
    ready = await end_of(store, job)
    assert (ready.status, ready.attempt, ready.progress) == ("ready", 1, 1.0)


async def test_a_cancelled_job_is_generated_no_further(store, folder, offer, employ):
    stopped = asyncio.Event()

    async def generate(job: object, request: ImageRequest) -> ImageResult:
        try:
            return await paint(job, request, 60)
        finally:
            stopped.set()

    job = await accept(store, folder, offer())
    worker = employ(generate)

    async def is_running() -> bool:
        return worker.num_running == 1

    await wait_until(is_running)
    assert await store.cancel("anna", job.job_id)
    await asyncio.wait_for(stopped.wait(), 60)
    assert (await end_of(store, job)).status == "cancelled"


async def test_a_stopped_worker_gives_its_jobs_back_at_once(store, folder, offer, employ):
    async def generate(job: object, request: ImageRequest) -> ImageResult:
        return await paint(job, request, 60)

    job = await accept(store, folder, offer())
    worker = employ(generate)

    async def is_running() -> bool:
        return (await store.find("anna", job.job_id)).status == "running"

    await wait_until(is_running)
    await worker.stop()
    lease = await store.claim("another")
    assert (lease.job_id, lease.job.num_lost) == (job.job_id, 0)


async def test_a_job_is_given_back_when_it_is_generated_no_more(store, folder, offer, employ):
    begun, is_generating = asyncio.Event(), True

    async def generate(job: object, request: ImageRequest) -> ImageResult:
        nonlocal is_generating
        begun.set()
        try:
            return await paint(job, request, 60)
        finally:
            await asyncio.sleep(0.05)
            is_generating = False

    await accept(store, folder, offer())
    worker = employ(generate)
    await begun.wait()
    stopping = asyncio.create_task(worker.stop())

    async def is_claimable() -> bool:
        return await store.claim("another") is not None

    await wait_until(is_claimable)
    assert not is_generating
    await stopping


async def test_a_worker_may_end_what_it_began(store, folder, offer, employ):
    async def generate(job: object, request: ImageRequest) -> ImageResult:
        return await paint(job, request, 0.2)

    jobs = [await accept(store, folder, offer(seed)) for seed in range(3)]
    worker = employ(generate, max_running=2)

    async def is_busy() -> bool:
        return worker.num_running == 2

    await wait_until(is_busy)
    await worker.stop(drain_s=60)
    ends = [(await store.find("anna", job.job_id)).status for job in jobs]
    assert sorted(ends) == ["pending", "ready", "ready"]


async def test_an_accepted_job_wakes_the_worker(store, folder, offer, employ):
    worker = employ(poll_s=60)
    await asyncio.sleep(0.1)
    job = await accept(store, folder, offer())
    worker.wake()
    assert (await end_of(store, job)).status == "ready"


def failing(*errors: Exception | type[BaseException]):
    """Draws after raising each of them."""
    left = list(errors)

    async def generate(job: object, request: ImageRequest) -> ImageResult:
        if left:
            raise left.pop(0)
        return await paint(job, request)

    return generate


async def test_a_callers_mistake_ends_the_job_with_its_words(store, folder, offer, employ):
    job = await accept(store, folder, offer())
    employ(failing(BadRequest("too wide", "width")))
    failed = await end_of(store, job)
    assert (failed.status, failed.failure) == ("failed", JobFailure("invalid_value", "too wide"))


async def test_a_failure_is_tried_again(store, folder, offer, employ):
    job = await accept(store, folder, offer())
    employ(failing(ReplicaFailed("died"), RuntimeError("a mistake"), asyncio.CancelledError()))
    ready = await end_of(store, job)
    assert (ready.status, ready.num_lost, ready.attempt) == ("ready", 3, 4)


async def test_a_job_that_fails_always_is_given_up_without_its_internals(
    store, folder, offer, employ
):
    job = await accept(store, folder, offer())
    employ(failing(*[RuntimeError("/a/path")] * 9), max_lost=3)
    failed = await end_of(store, job)
    assert (failed.status, failed.failure, failed.num_lost) == ("failed", outcome.LOST, 3)


async def test_a_job_waits_for_its_turn_for_ever(store, folder, offer, employ, monkeypatch):
    busy = Overloaded("busy")
    busy.retry_after_s = 0.01
    job = await accept(store, folder, offer())
    employ(failing(*[busy] * 9), max_lost=3)
    ready = await end_of(store, job)
    assert (ready.status, ready.num_lost, ready.attempt) == ("ready", 0, 10)


async def test_outages_of_both_stores_cost_no_image(store, folder, offer, employ, monkeypatch):
    def sometimes(call, error):
        count = 0

        async def flaky(*args, **rest):
            nonlocal count
            count += 1
            if count % 3:
                raise error
            return await call(*args, **rest)

        return flaky

    for name in ("claim", "beat", "finish"):
        monkeypatch.setattr(store, name, sometimes(getattr(store, name), StoreLost("away")))
    for name in ("read_references", "write_images"):
        monkeypatch.setattr(folder, name, sometimes(getattr(folder, name), ResultsLost("away")))
    jobs = [await accept(store, folder, offer(seed, references=(RED,))) for seed in range(5)]
    employ()
    for seed, job in enumerate(jobs):
        ready = await end_of(store, job)
        wanted = offer(seed, references=(RED,)).request
        assert await images_of(folder, ready) == [image_for(wanted, seed)]


async def test_a_worker_whose_job_was_taken_leaves_it_alone(store, folder, offer, employ):
    begun, gone_on = asyncio.Event(), asyncio.Event()

    async def late(job, request: ImageRequest) -> ImageResult:
        begun.set()
        await gone_on.wait()
        return await paint(job, request)

    async def no_beat(lease, progress=None, standing=None) -> bool:
        raise StoreLost("away")

    job = await accept(store, folder, offer())
    cut_off = Store(store._database, LEASE_S, keep_s=100)
    cut_off.beat = no_beat
    first = Worker(WorkerContext(cut_off, folder, late), 1, 0.01)
    first.start()
    await begun.wait()
    claimed = asyncio.Event()

    async def quick(job, request: ImageRequest) -> ImageResult:
        claimed.set()
        return await paint(job, request)

    # Only one of them claims from now on: the other has no room.
    employ(quick)
    ready = await end_of(store, job)
    assert claimed.is_set() and ready.attempt == 2
    gone_on.set()
    await first.stop(drain_s=5)
    assert await store.find("anna", job.job_id) == ready


async def test_a_database_server_that_restarts_costs_nothing(postgres, folder, offer):
    database = Database(postgres.new_database())
    await database.create()
    store = Store(database, LEASE_S, keep_s=100)
    jobs = [await accept(store, folder, offer(seed)) for seed in range(30)]

    async def generate(job: object, request: ImageRequest) -> ImageResult:
        return await paint(job, request, 0.05)

    worker = Worker(WorkerContext(store, folder, generate, pause_s=0.05), 4, 0.02)
    worker.start()
    await asyncio.sleep(0.1)
    await asyncio.to_thread(postgres.stop)
    await asyncio.sleep(0.3)
    with pytest.raises(StoreLost):
        await store.find("anna", jobs[0].job_id)
    await asyncio.to_thread(postgres.start)
    for job in jobs:
        assert (await end_of(store, job)).status == "ready"
    await worker.stop()
    await database.close()
