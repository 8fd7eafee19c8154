"""A client of the gateway, without a network, and a desk for its jobs."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from flux_ray.config.gateway import GatewayArgs, JobArgs
from flux_ray.jobs.attempt import Generate
from flux_ray.jobs.service import JobService
from tests.jobs.painter import paint


@pytest.fixture
def job_args(tmp_path: Path) -> JobArgs:
    """All that is kept is in the test's own folder."""
    return JobArgs(database=f"sqlite:///{tmp_path}/jobs.sqlite3", results=f"{tmp_path}/results")


@pytest.fixture
def generate_job() -> Generate:
    """What draws jobs: a painter, for the cluster."""
    return paint


@pytest.fixture
async def desk(gateway_args: GatewayArgs, generate_job: Generate) -> AsyncIterator[JobService]:
    """Of the gateway's args."""
    desk = JobService(gateway_args.jobs, generate_job)
    await desk.open()
    yield desk
    await desk.close()


@pytest.fixture
async def client(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client
