"""`GET /v1/jobs` and what `get_result` says of jobs that wait, over a real desk."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.bfl.routes import job_service_for
from flux_ray.jobs.service import JobService
from flux_ray.jobs.webhooks import NotTaken
from flux_ray.request import (
    ImageRequest,
    ImageResult,
    OnEvent,
    Progress,
    QueuePosition,
    RequestEvent,
)
from tests.conftest import LIMITS, FakeHandles


class Poster:
    """Takes nothing: every webhook answers 301."""

    async def post(self, *message: object) -> None:
        raise NotTaken("status 301")


@pytest.fixture
def gateway_args(job_args) -> GatewayArgs:
    args = job_args.model_copy(update={"webhook_retries_s": (0.01,), "max_running": 1})
    return GatewayArgs(tiers=("tiny",), limits=LIMITS, public_url="https://flux.example", jobs=args)


@pytest.fixture
async def desk(router, gateway_args) -> AsyncIterator[JobService]:
    desk = job_service_for(router, gateway_args, Poster())
    assert desk is not None
    await desk.open()
    yield desk
    await desk.close()


@pytest.fixture
def api(router, gateway_args, desk) -> FastAPI:
    return build_api(router, gateway_args, job_service=desk)


@pytest.fixture
def told(handles: FakeHandles, monkeypatch) -> Callable[..., None]:
    """`told(*news)`: what the next jobs hear before they wait until `told.go` is set."""
    news: list[RequestEvent] = []
    go = asyncio.Event()
    of_handles = handles.generate

    async def generate(
        request: ImageRequest, replica: str, on_event: OnEvent | None = None
    ) -> ImageResult:
        for each in news:
            assert on_event is not None
            on_event(each)
        await go.wait()
        return await of_handles(request, replica)

    monkeypatch.setattr(handles, "generate", generate)

    def tell(*what: RequestEvent) -> None:
        news[:] = what

    tell.go = go  # type: ignore[attr-defined]
    return tell


async def submit(client: httpx.AsyncClient, key: str = "k", **fields: Any) -> str:
    body = {"prompt": "a ring"} | fields
    answer = await client.post("/v1/tiny", json=body, headers={"x-key": key})
    assert answer.status_code == 200, answer.text
    job_id: str = answer.json()["id"]
    return job_id


async def listed(client: httpx.AsyncClient, key: str = "k", **query: Any) -> dict[str, Any]:
    answer = await client.get("/v1/jobs", params=query, headers={"x-key": key})
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


async def result_until(
    client: httpx.AsyncClient, job_id: str, is_so: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Ask until it is so; the test's own time limit ends this."""
    async with asyncio.timeout(60):
        while True:
            answer = await client.get(
                "/v1/get_result", params={"id": job_id}, headers={"x-key": "k"}
            )
            result: dict[str, Any] = answer.json()
            if is_so(result):
                return result
            await asyncio.sleep(0.02)


async def test_a_keys_jobs_are_listed_with_their_own_words(client):
    ids = [await submit(client, metadata={"row": str(number)}) for number in range(3)]
    await submit(client, key="other")
    for job_id in ids:
        await result_until(client, job_id, lambda result: result["status"] == "Ready")
    page = await listed(client)
    assert [job["id"] for job in page["jobs"]] == ids[::-1]
    assert [job["metadata"] for job in page["jobs"]] == [{"row": str(n)} for n in (2, 1, 0)]
    assert {(job["status"], job["state"]) for job in page["jobs"]} == {("Ready", "ready")}
    assert page["jobs"][0]["result"]["sample"].startswith("https://flux.example/results/")
    assert page["before"] is None
    result = await result_until(client, ids[1], lambda result: True)
    assert result["details"]["metadata"] == {"row": "1"}
    assert [job["id"] for job in (await listed(client, status="failed"))["jobs"]] == []
    assert len((await listed(client, key="other"))["jobs"]) == 1


async def test_pages_follow_each_other(client):
    ids = [await submit(client) for _ in range(3)]
    first = await listed(client, limit=2)
    assert [job["id"] for job in first["jobs"]] == ids[:0:-1]
    last = await listed(client, limit=2, before=first["before"])
    assert [job["id"] for job in last["jobs"]] == ids[:1]
    assert last["before"] is None


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 101}, {"status": "arriving"}, {"before": "x"}]
)
async def test_mistakes_are_told_in_bfls_words(client, query):
    answer = await client.get("/v1/jobs", params=query)
    assert answer.status_code == 422
    [name] = query
    assert answer.json()["detail"][0]["loc"] == ["query", name]


async def test_a_page_after_somebody_elses_job_is_refused(client):
    theirs = await submit(client, key="other")
    answer = await client.get("/v1/jobs", params={"before": theirs}, headers={"x-key": "k"})
    assert answer.status_code == 422


@pytest.mark.parametrize(
    "metadata",
    [{"a": 1}, {"": "x"}, {"a" * 65: "x"}, {"a": "x" * 513}, {str(n): "x" for n in range(17)}, []],
)
async def test_metadata_has_limits(client, metadata):
    answer = await client.post("/v1/tiny", json={"prompt": "a ring", "metadata": metadata})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "metadata"]


async def test_a_job_that_waits_says_where(client, told):
    """First in the queue of its tier, by what its worker hears there; the next for a worker."""
    told(QueuePosition(4, 61.5))
    first = await submit(client)
    second = await submit(client)
    waiting = await result_until(client, first, lambda result: "position" in result["details"])
    details = waiting["details"]
    assert (details["position"], details["expected_s"]) == (4, 61.5)
    waiting = await result_until(client, second, lambda result: "position" in result["details"])
    assert (waiting["details"]["position"], waiting["details"]["expected_s"]) == (0, None)
    told.go.set()
    for job_id in (first, second):
        done = await result_until(client, job_id, lambda result: result["status"] == "Ready")
        assert "position" not in done["details"]


async def test_a_job_that_runs_waits_no_more(client, told):
    told(QueuePosition(4, 61.5), Progress(1, 4))
    job_id = await submit(client)
    running = await result_until(client, job_id, lambda result: result["progress"])
    assert "position" not in running["details"]
    told.go.set()


async def test_a_webhook_that_redirects_is_told_of_in_the_result(client, desk):
    job_id = await submit(client, webhook_url="https://example.com/hook")
    told_of = await result_until(
        client,
        job_id,
        lambda result: result["details"].get("webhook", {}).get("status") == "given up",
    )
    assert told_of["details"]["webhook"] == {"status": "given up", "num_failed": 1}


async def test_a_job_without_a_webhook_says_nothing_of_it(client):
    job_id = await submit(client)
    done = await result_until(client, job_id, lambda result: result["status"] == "Ready")
    assert "webhook" not in done["details"]
