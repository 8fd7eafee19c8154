"""What callers hear while the job database is busy with others, or was deleted."""

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.jobs import JobGenerator
from flux_ray.jobs import database as database_module
from tests.conftest import LIMITS
from tests.jobs.waiting import wait_until

LOCKED_S = 3.0
JOB = {"prompt": "a red circle"}


@pytest.fixture
def path(job_args) -> Path:
    return Path(job_args.database.removeprefix("sqlite:///"))


@pytest.fixture
def gateway_args(job_args) -> GatewayArgs:
    public = {"public_url": "https://flux.example", "jobs": job_args}
    return GatewayArgs(tiers=("tiny",), limits=LIMITS, **public)


@pytest.fixture
def generate_job(router, gateway_args):
    return JobGenerator(router, gateway_args).generate


@pytest.fixture
def api(router, gateway_args, desk):
    return build_api(router, gateway_args, job_service=desk)


def delete(path: Path) -> None:
    for end in ("", "-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)


async def ready_job(client) -> str:
    job_id = (await client.post("/v1/tiny", json=JOB)).json()["id"]

    async def is_ready() -> bool:
        answer = await client.get("/v1/get_result", params={"id": job_id})
        return answer.json()["status"] == "Ready"

    await wait_until(is_ready)
    return job_id


async def test_polls_are_answered_while_others_write(client, path):
    job_id = await ready_job(client)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    submits = [asyncio.create_task(client.post("/v1/tiny", json=JOB)) for _ in range(20)]
    began = time.monotonic()
    # The lock is held until this is over: whoever waited for it would not be answered 200.
    while time.monotonic() - began < LOCKED_S:
        answer = await client.get("/v1/get_result", params={"id": job_id})
        assert answer.json()["status"] == "Ready"
        assert (await client.get("/v1/jobs")).status_code == 200
        sample = answer.json()["result"]["sample"].removeprefix("https://flux.example")
        assert (await client.get(sample)).status_code == 200
        await asyncio.sleep(0.05)
    assert not any(each.done() for each in submits)
    other.execute("COMMIT")
    other.close()
    assert [each.status_code for each in await asyncio.gather(*submits)] == [200] * 20


async def test_a_deleted_database_is_told_of_until_it_is_made_anew(client, path, monkeypatch):
    monkeypatch.setattr(database_module, "SETTLE_S", 0.3)
    job_id = await ready_job(client)
    delete(path)
    answers = await asyncio.gather(*(client.post("/v1/tiny", json=JOB) for _ in range(12)))
    answers.append(await client.get("/v1/get_result", params={"id": job_id}))
    for answer in answers:
        assert answer.status_code == 503, "nothing is accepted and lost"
        assert "jobs cannot be kept or found now" in answer.text
        assert "retry-after" in answer.headers
    assert (await client.post("/v1/images/generations", json=JOB)).status_code == 200

    async def is_taken() -> bool:
        return (await client.post("/v1/tiny", json=JOB)).status_code == 200

    await wait_until(is_taken)
    assert (await client.get("/v1/get_result", params={"id": job_id})).status_code == 404
    await ready_job(client)
