"""Webhooks of BFL's routes: what is taken, and how the ends of jobs are told of."""

import json

import httpx
import pytest
from fastapi import FastAPI
from standardwebhooks import Webhook as Verifier

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.bfl.routes import job_service_for
from tests.conftest import LIMITS
from tests.jobs.waiting import wait_until
from tests.webhook_receiver import WebhookReceiver, receiving

PUBLIC = "https://flux.example"
SECRET = "s3cr3t"


@pytest.fixture
async def receiver():
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def gateway_args(job_args, receiver) -> GatewayArgs:
    webhooks = {"schemes": ["http"], "ports": [receiver.port], "networks": ["127.0.0.1/32"]}
    return GatewayArgs.model_validate(
        {"tiers": ["tiny"], "limits": LIMITS, "public_url": PUBLIC, "jobs": job_args}
        | {"webhooks": webhooks}
    )


@pytest.fixture
async def desk(router, gateway_args):
    desk = job_service_for(router, gateway_args)
    await desk.open()
    yield desk
    await desk.close()


@pytest.fixture
def api(router, gateway_args, desk) -> FastAPI:
    return build_api(router, gateway_args, job_service=desk)


async def submit(client: httpx.AsyncClient, url: str, **fields) -> httpx.Response:
    body = {"prompt": "a red circle", "seed": 5, "webhook_url": url} | fields
    return await client.post("/v1/tiny", json=body, headers={"x-key": "k"})


async def told_by(receiver: WebhookReceiver) -> dict:
    async def has_come() -> bool:
        return bool(receiver.posts)

    await wait_until(has_come)
    [post] = receiver.posts
    Verifier(SECRET.encode()).verify(post.body, post.headers)
    assert SECRET not in str(post)
    return json.loads(post.body)


async def test_a_ready_job_is_told_of(client, receiver):
    url = f"http://127.0.0.1:{receiver.port}/good?token=1"
    answer = await submit(client, url, webhook_secret=SECRET)
    assert answer.status_code == 200
    assert answer.json()["webhook_url"] == url
    assert SECRET not in answer.text
    told = await told_by(receiver)
    assert (told["id"], told["status"]) == (answer.json()["id"], "Ready")
    result = told["result"]
    assert (result["prompt"], result["seed"]) == ("a red circle", 5)
    assert told["timestamp"] == result["end_time"]
    assert "error" not in told
    path = result["sample"].removeprefix(PUBLIC)
    assert (await client.get(path)).content == b"image 5"


async def test_a_cancelled_job_is_told_of(client, receiver, monkeypatch):
    monkeypatch.setattr("flux_ray.jobs.store.Store.claim", no_claim)
    url = f"http://127.0.0.1:{receiver.port}/good"
    answer = await submit(client, url, webhook_secret=SECRET)
    job_id = answer.json()["id"]
    cancelled = await client.post(f"/v1/cancel?id={job_id}", headers={"x-key": "k"})
    assert cancelled.json()["status"] == "Error"
    told = await told_by(receiver)
    assert (told["id"], told["status"], told["error"]) == (job_id, "Error", "cancelled")
    assert told["message"] == "the job was cancelled"
    assert "result" not in told


async def no_claim(store: object, worker: str) -> None:
    """Nobody draws."""


@pytest.mark.parametrize(
    ("url", "secret", "field"),
    [
        ("http://8.8.8.8/hook", SECRET, "webhook_url"),
        ("http://10.0.0.1:{port}/hook", SECRET, "webhook_url"),
        ("https://127.0.0.1:{port}/hook", SECRET, "webhook_url"),
        ("http://a@example.org:{port}/hook", SECRET, "webhook_url"),
        ("http://127.0.0.1:{port}/good", "whsec_!", "webhook_secret"),
        ("http://127.0.0.1:{port}/good", "a\0b", "webhook_secret"),
    ],
)
async def test_what_is_refused(client, receiver, handles, url, secret, field):
    answer = await submit(client, url.format(port=receiver.port), webhook_secret=secret)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", field]
    assert secret not in answer.text
    assert handles.requests == []


async def test_without_a_secret_nothing_is_signed(client, receiver):
    url = f"http://127.0.0.1:{receiver.port}/good"
    assert (await submit(client, url, webhook_secret="")).status_code == 200

    async def has_come() -> bool:
        return bool(receiver.posts)

    await wait_until(has_come)
    headers = receiver.posts[0].headers
    assert "webhook-id" in headers
    assert not {"webhook-signature", "x-bfl-signature"} & headers.keys()
