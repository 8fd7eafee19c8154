"""Jobs and keys: whose they are, how many a key may have, and what its day has left."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import httpx
import pytest

from flux_ray.auth.keys import KeyFile, new_key, write_keys
from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.jobs import JobGenerator
from flux_ray.jobs.service import JobService
from flux_ray.router.ledger.quota_client import QuotaClient
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.router import Router, Terms
from tests.conftest import LIMITS, FakeBill
from tests.gateway.bfl.test_routes import PUBLIC, poll, submit
from tests.gateway.test_key_limits import Books, LimitedTurns

NOW = datetime(2026, 11, 1, tzinfo=UTC)
CLASSES = {
    "few": {"max_concurrent": 2},
    "quick": {"requests_per_minute": 2},
    "both": {"max_concurrent": 2, "requests_per_minute": 4},
    "small": {"megapixels_per_day": 0.04},
    "poor": {"gpu_seconds_per_day": 1.5},
    "klein": {"licenses": ["flux-non-commercial"], "tiers": ["flux-2-klein-9b"]},
}
KEYS = {name: new_key(name, name, NOW) for name in CLASSES} | {
    name: new_key(name, None, NOW) for name in ("anna", "ben")
}
ANNA_TOO = new_key("anna", None, NOW)


@pytest.fixture
def gateway_args(tmp_path, job_args) -> GatewayArgs:
    live = (*(each.key for each in KEYS.values()), ANNA_TOO.key)
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=live))
    return GatewayArgs.model_validate(
        {
            "tiers": ["tiny", "flux-2-klein-9b"],
            "limits": LIMITS,
            "public_url": PUBLIC,
            "jobs": job_args,
            "keys_file": tmp_path / "keys.yaml",
            "key_classes": CLASSES,
        }
    )


@pytest.fixture
async def router(handles) -> AsyncIterator[Router]:
    tiers = ("tiny", "flux-2-klein-9b")
    prices = CostModel({tier: ReplicaSpec("cpu", dtype="float32") for tier in tiers})
    books = Books()
    gate, turns = QuotaClient(books, "g"), LimitedTurns(books, "g")
    yield Router(handles, turns, prices, FakeBill(), Terms(5), None, gate)
    gate.stop()


@pytest.fixture
async def desk(router, gateway_args) -> AsyncIterator[JobService]:
    """Nobody draws before it is opened by the test."""
    desk = JobService(gateway_args.jobs, JobGenerator(router, gateway_args).generate)
    await desk._database.create()
    yield desk
    await desk.close()


@pytest.fixture
def api(router, gateway_args, desk):
    return build_api(router, gateway_args, job_service=desk)


def key_of(name: str) -> str:
    return KEYS[name].secret


async def test_jobs_belong_to_their_key_whatever_its_secret(client, desk):
    told = (await submit(client, key=key_of("anna"))).json()
    for secret, status in ((key_of("anna"), 200), (ANNA_TOO.secret, 200), (key_of("ben"), 404)):
        headers = {"authorization": f"Bearer {secret}"}
        answer = await client.get("/v1/get_result", params={"id": told["id"]}, headers=headers)
        assert answer.status_code == status
    answer = await client.post(
        "/v1/cancel", params={"id": told["id"]}, headers={"x-key": key_of("ben")}
    )
    assert answer.status_code == 404
    await desk.open()
    assert (await poll(client, told["id"], key_of("anna")))["status"] == "Ready"


@pytest.mark.parametrize("headers", [{}, {"x-key": "wrong"}, {"authorization": "Bearer fr-no"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/tiny"),
        ("GET", "/v1/get_result?id=x"),
        ("POST", "/v1/cancel?id=x"),
        ("GET", "/v1/credits"),
        ("GET", "/v1/my_finetunes"),
    ],
)
async def test_without_a_key_bfls_routes_answer_as_bfl(client, method, path, headers):
    answer = await client.request(method, path, headers=headers)
    assert answer.status_code == 403
    assert answer.json()["detail"] == "Not authenticated"


async def test_a_key_has_so_many_jobs_at_once(client, desk):
    jobs = [(await submit(client, key=key_of("few"))).json()["id"] for _ in range(2)]
    answer = await submit(client, key=key_of("few"))
    assert answer.status_code == 429
    assert answer.headers["x-ratelimit-limit"] == "2"
    assert int(answer.headers["retry-after"]) >= 1
    assert (await submit(client, key=key_of("anna"))).status_code == 200, "others have their own"
    await client.post("/v1/cancel", params={"id": jobs[0]}, headers={"x-key": key_of("few")})
    assert (await submit(client, key=key_of("few"))).status_code == 200
    await desk.open()
    assert (await poll(client, jobs[1], key_of("few")))["status"] == "Ready"


async def test_what_was_too_many_is_no_request_of_its_minute(client, desk):
    for _ in range(2):
        assert (await submit(client, key=key_of("both"))).status_code == 200
    for _ in range(3):
        answer = await submit(client, key=key_of("both"))
        assert "2 unfinished jobs" in answer.json()["message"]


async def test_a_client_that_heard_nothing_is_not_counted_twice(client, desk):
    async def send(words: str) -> httpx.Response:
        headers = {"x-key": key_of("few"), "idempotency-key": words}
        return await client.post("/v1/tiny", json={"prompt": words}, headers=headers)

    jobs = {(await send(words)).json()["id"] for words in ("a", "b", "a", "b", "a")}
    assert len(jobs) == 2
    assert (await send("c")).status_code == 429


async def test_a_job_is_one_request_of_its_minute(client, desk):
    await desk.open()
    jobs = [(await submit(client, key=key_of("quick"))).json()["id"] for _ in range(2)]
    assert (await submit(client, key=key_of("quick"))).status_code == 429
    for job_id in jobs:
        assert (await poll(client, job_id, key_of("quick")))["status"] == "Ready"


async def test_a_day_that_is_spent_is_bfls_402(client, desk):
    await desk.open()
    for _ in range(2):
        told = await submit(client, key=key_of("small"), width=128, height=128)
        assert (await poll(client, told.json()["id"], key_of("small")))["status"] == "Ready"
    answer = await submit(client, key=key_of("small"), width=128, height=128)
    assert answer.status_code == 402
    assert answer.json()["detail"] == answer.json()["message"]


async def test_tiers_of_other_keys_are_refused(client):
    answer = await submit(client, key=key_of("klein"))
    assert answer.status_code == 403
    assert answer.json()["message"] == "this key may not use tiny"


async def test_credits_are_what_a_key_has_left_today(client, desk):
    async def credits(name):
        answer = await client.get("/v1/credits", headers={"x-key": key_of(name)})
        return answer.json()["credits"]

    assert await credits("poor") == 1.5
    assert await credits("anna") == 1e9
    body = {"model": "tiny", "prompt": "a ring", "size": "128x128"}
    headers = {"x-key": key_of("poor")}
    generated = await client.post("/v1/images/generations", json=body, headers=headers)
    assert generated.status_code == 200, generated.text
    assert await credits("poor") == pytest.approx(1.5 - 0.009), "what the fakes took"


async def test_images_that_were_kept_are_nobodys_jobs(client, desk):
    """Though their URLs tell a name like that of a job."""
    body = {"model": "tiny", "prompt": "a ring", "response_format": "url"}
    headers = {"x-key": key_of("anna")}
    answer = await client.post("/v1/images/generations", json=body, headers=headers)
    job_id = answer.json()["data"][0]["url"].split("/")[-2]
    found = await client.get("/v1/get_result", params={"id": job_id}, headers=headers)
    assert (found.status_code, found.json()["status"]) == (404, "Task not found")
