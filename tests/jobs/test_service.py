"""The desk: what its args say is so, and any gateway answers for any job."""

import pytest
from pydantic import ValidationError

from flux_ray.config.gateway import JobArgs
from flux_ray.jobs.service import JobService
from flux_ray.request import RgbImage
from tests.jobs.painter import image_for, paint
from tests.jobs.waiting import wait_until

RED = RgbImage(1, 1, b"\xff\0\0")


@pytest.fixture
def args(database_url, tmp_path) -> JobArgs:
    return JobArgs(database=database_url, results=str(tmp_path / "results"))


async def test_any_gateway_answers_for_any_job(args, offer, tmp_path):
    async def never(job, request):
        return await paint(job, request, 60)

    first, second = JobService(args, paint), JobService(args, never)
    await first.open()
    wanted = offer()
    job = await first.accept(wanted)

    async def is_ready() -> bool:
        return (await second.find("anna", job.job_id)).status == "ready"

    await wait_until(is_ready)
    found = await second.find("anna", job.job_id)
    data = await second.read_by_name(found.result.images[0].name)
    assert data == image_for(wanted.request, wanted.request.seed)
    assert await second.find("ben", job.job_id) is None
    await first.close()

    await second.open()
    waiting = await second.accept(offer(seed=8, references=(RED,)))
    folder = tmp_path / "results" / waiting.job_id
    assert [path.name for path in folder.iterdir()] == ["reference-0"]
    assert await first.num_active("anna") == 1
    assert await first.cancel("anna", waiting.job_id)
    assert await second.num_active("anna") == 0
    assert not list(folder.iterdir()), "nobody reads its references"
    await first.close()
    await second.close()


async def test_a_gateway_that_closes_leaves_its_jobs_to_the_next(args, offer):
    async def never(job, request):
        return await paint(job, request, 60)

    first, second = JobService(args, never), JobService(args, paint)
    await first.open()
    job = await first.accept(offer())

    async def is_running() -> bool:
        return (await first.find("anna", job.job_id)).status == "running"

    await wait_until(is_running)
    await first.close()
    await second.open()

    async def is_ready() -> bool:
        return (await second.find("anna", job.job_id)).status == "ready"

    await wait_until(is_ready)
    await second.close()


async def test_folders_are_for_nobody_else(tmp_path, offer):
    rows, results = tmp_path / "a" / "rows", tmp_path / "b" / "results"
    desk = JobService(
        JobArgs(database=f"sqlite:///{rows}/jobs.sqlite3", results=str(results)), paint
    )
    await desk.open()
    job = await desk.accept(offer())

    async def is_ready() -> bool:
        return (await desk.find("anna", job.job_id)).status == "ready"

    await wait_until(is_ready)
    await desk.close()
    assert [oct(folder.stat().st_mode & 0o777) for folder in (rows, results)] == ["0o700"] * 2


def test_the_default_needs_no_server():
    args = JobArgs()
    assert args.database.startswith("sqlite:///")
    assert "://" not in args.results


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"database": "mysql://host/jobs"}, "database"),
        ({"database": "sqlite://"}, "database"),
        ({"lease_s": 10, "keep_s": 5}, "keep_s 5 is below lease_s 10"),
        ({"keep": 5}, "keep"),
    ],
)
def test_what_cannot_be_is_named(args, named):
    with pytest.raises(ValidationError, match=named):
        JobArgs(**args)
