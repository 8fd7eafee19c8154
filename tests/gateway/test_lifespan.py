"""The desk of a gateway that is replaced: it claims no more, and what it draws may end."""

import asyncio

import pytest
from fastapi import FastAPI

from flux_ray.config.gateway import JobArgs
from flux_ray.gateway import api as lifespan
from flux_ray.gateway.api import GIVE_BACK_S, drain_s_of, lifespan_of
from flux_ray.jobs.job import JobSubmission
from flux_ray.jobs.service import JobService
from flux_ray.request import ImageRequest, ImageResult, QueuePosition
from tests.jobs.painter import paint
from tests.jobs.waiting import wait_until

DRAIN_S = 660.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(lifespan, "NOTICE_PERIOD_S", 0.01)


@pytest.fixture
def args(tmp_path) -> JobArgs:
    results = str(tmp_path / "results")
    return JobArgs(database=f"sqlite:///{tmp_path}/jobs.sqlite3", results=results, lease_s=3)


def offer(seed: int) -> JobSubmission:
    return JobSubmission("anna", ImageRequest("r", "tiny", f"no. {seed}", 64, 48, 4, 1.0, seed))


class Easel:
    """Draws until it is told to be done."""

    def __init__(self) -> None:
        self.begun, self.done = asyncio.Event(), asyncio.Event()

    async def generate(self, job, request) -> ImageResult:
        self.begun.set()
        await self.done.wait()
        return await paint(job, request)


class Served:
    """The application's life, as a server leads it."""

    def __init__(self, desk: JobService, drain_timeout_s: float) -> None:
        self.is_stopping = False
        make = lifespan_of(desk, drain_timeout_s, lambda: self.is_stopping)
        self._lifespan = make(FastAPI())

    async def __aenter__(self) -> "Served":
        await self._lifespan.__aenter__()
        return self

    async def __aexit__(self, *error) -> None:
        await self._lifespan.__aexit__(*error)


async def status_of(desk: JobService, job) -> str:
    return (await desk.find("anna", job.job_id)).status


async def test_a_running_job_ends_at_the_gateway_that_is_replaced(args):
    easel = Easel()
    desk, observer = JobService(args, easel.generate), JobService(args, paint)
    async with Served(desk, DRAIN_S) as served:
        job = await desk.accept(offer(1))
        await easel.begun.wait()
        served.is_stopping = True
        await wait_until(lambda: is_leaving(desk))
        # A request that is still answered hands it in.
        later = await desk.accept(offer(2))
        asyncio.get_running_loop().call_later(0.3, easel.done.set)
    found = await observer.find("anna", job.job_id)
    assert (found.status, found.attempt) == ("ready", 1)
    found = await observer.find("anna", later.job_id)
    assert (found.status, found.attempt) == ("pending", 0), "it is the next gateway's"
    await observer.close()


async def is_leaving(desk: JobService) -> bool:
    return desk._worker._is_stopping


async def test_what_is_not_done_in_time_is_given_back_uncounted(args):
    easel = Easel()
    desk, observer = JobService(args, easel.generate), JobService(args, paint)
    async with Served(desk, drain_timeout_s=0.2):
        job = await desk.accept(offer(1))
        await easel.begun.wait()
    found = await observer.find("anna", job.job_id)
    assert (found.status, found.num_lost) == ("pending", 0)
    await observer.close()


async def test_a_job_that_waits_for_a_replica_is_given_back_at_once(args):
    easel = Easel()
    desk = JobService(args, easel.generate, standing_of=lambda request_id: QueuePosition(3, 100.0))
    observer = JobService(args, paint)
    async with Served(desk, DRAIN_S):
        job = await desk.accept(offer(1))
        await easel.begun.wait()
    found = await observer.find("anna", job.job_id)
    assert (found.status, found.num_lost) == ("pending", 0)
    await observer.close()


def test_time_is_kept_to_give_back():
    assert drain_s_of(660, 0) == 660 - GIVE_BACK_S
    assert drain_s_of(660, 100) == 560 - GIVE_BACK_S
    assert drain_s_of(660, 700) == 0
    assert drain_s_of(4, 0) == 2
