"""BFL's `preview`: while a job of many steps is drawn, where what it will look like is."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.bfl.routes import job_service_for
from flux_ray.jobs.service import JobService
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.router import Router, Terms
from tests.conftest import LIMITS, FakeBill, FakeHandles
from tests.gateway.bfl.test_routes import PUBLIC, poll, submit
from tests.jobs.waiting import wait_until

TIERS = ("flux-2-dev", "tiny")


class Slow(FakeHandles):
    """Replicas that end when they are told to; what is heard of an image comes before."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()

    async def generate(self, request, replica, on_event=None):
        result = await super().generate(request, replica, on_event)
        await self.may_end.wait()
        return result


@pytest.fixture
def handles() -> Slow:
    return Slow()


@pytest.fixture
def router(handles, turns) -> Router:
    layouts = {
        "flux-2-dev": ReplicaSpec("h100-80gb", tensor=2),
        "tiny": ReplicaSpec("cpu", dtype="float32"),
    }
    return Router(handles, turns, CostModel(layouts), FakeBill(), Terms(request_timeout_s=5))


@pytest.fixture
def gateway_args(job_args) -> GatewayArgs:
    return GatewayArgs(tiers=TIERS, limits=LIMITS, public_url=PUBLIC, jobs=job_args)


@pytest.fixture
async def desk(router, gateway_args, monkeypatch) -> AsyncIterator[JobService]:
    monkeypatch.setattr("flux_ray.jobs.attempt.MAX_BEAT_S", 0.01)
    desk = job_service_for(router, gateway_args)
    await desk.open()
    yield desk
    await desk.close()


@pytest.fixture
def api(router, gateway_args, desk):
    return build_api(router, gateway_args, job_service=desk)


async def told_of(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    params = {"id": job_id}
    return (await client.get("/v1/get_result", params=params, headers={"x-key": "k"})).json()


async def fetch(client: httpx.AsyncClient, url: str) -> httpx.Response:
    assert url.startswith(f"{PUBLIC}/results/")
    return await client.get(httpx.URL(url).raw_path.decode().removeprefix("/api"))


async def previewed(client: httpx.AsyncClient, job_id: str) -> str:
    async def is_previewed() -> bool:
        return (await told_of(client, job_id))["preview"] is not None

    await wait_until(is_previewed)
    told = await told_of(client, job_id)
    assert (told["status"], told["result"]) == ("Pending", None)
    return told["preview"]["sample"]


async def test_a_long_job_is_previewed_until_it_ends(client, handles):
    job_id = (await submit(client, "flux-2-dev", seed=5, steps=28)).json()["id"]
    url = await previewed(client, job_id)
    shown = await fetch(client, url)
    assert (shown.status_code, shown.content) == (200, b"preview 2")
    assert shown.headers["content-type"] == "image/jpeg"
    assert [request.preview_steps for request in handles.requests] == [(7, 14, 21)]

    handles.may_end.set()
    told = await poll(client, job_id)
    assert (told["status"], told["preview"]) == ("Ready", None)
    assert (await fetch(client, told["result"]["sample"])).content == b"image 5"
    assert (await fetch(client, url)).status_code == 404


@pytest.mark.parametrize(
    ("tier", "steps", "count"),
    [("flux-2-dev", 7, 0), ("flux-2-dev", 8, 3), ("flux-2-dev", None, 3), ("tiny", 50, 0)],
)
async def test_a_job_of_few_steps_does_no_extra_work(client, handles, tier, steps, count):
    handles.may_end.set()
    job_id = (await submit(client, tier, steps=steps)).json()["id"]
    assert (await poll(client, job_id))["preview"] is None
    [request] = handles.requests
    assert request.num_previews == len(request.preview_steps) == count
