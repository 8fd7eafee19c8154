"""Jobs of BFL's routes: their words are chosen when they are accepted, and stay."""

import asyncio
import base64
import io

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from flux_ray.config import GatewayArgs
from flux_ray.errors import ReplicaFailed
from flux_ray.gateway.api import build_api
from flux_ray.gateway.jobs import JobGenerator
from tests.conftest import LIMITS

DETAILED = "detailed: a ring"


@pytest.fixture
def gateway_args(job_args) -> GatewayArgs:
    return GatewayArgs(
        tiers=("tiny",), limits=LIMITS, public_url="https://flux.example", jobs=job_args
    )


@pytest.fixture
def generate_job(router, gateway_args):
    return JobGenerator(router, gateway_args).generate


@pytest.fixture
def api(router, args_with, desk) -> FastAPI:
    return build_api(router, args_with(gpu_seconds_per_second=1000.0), job_service=desk)


@pytest.fixture
def submit(client):
    async def submit(**fields):
        headers = fields.pop("headers", {})
        return await client.post("/v1/tiny", json={"prompt": "a ring"} | fields, headers=headers)

    return submit


async def end_of(client, job_id: str):
    for _ in range(1000):
        told = (await client.get("/v1/get_result", params={"id": job_id})).json()
        if told["status"] != "Pending":
            return told
        await asyncio.sleep(0.02)
    raise AssertionError("still pending")


async def test_the_result_has_the_words(submit, client, handles, llm, bill):
    llm.delay_s = 0.1
    told = (await submit(prompt_upsampling=True)).json()
    assert told["details"]["warnings"] == []
    assert told["details"]["upsampling_s"] >= 0.1
    assert told["cost"] > 100
    ended = await end_of(client, told["id"])
    assert ended["result"]["prompt"] == DETAILED
    assert handles.requests[0].prompt == DETAILED
    assert dict(bill.spent)["drawn"] > 100


@pytest.mark.parametrize(
    "sent", [{}, {"prompt_upsampling": False}, {"prompt_upsampling": None}, {"disable_pup": True}]
)
async def test_what_clients_always_send_goes_through(submit, client, llm, sent):
    answer = await submit(**sent)
    assert answer.status_code == 200
    told = answer.json()
    assert told["details"] == {"served_model": "tiny", "warnings": []}
    assert (await end_of(client, told["id"]))["result"]["prompt"] == "a ring"
    assert llm.asked == []


async def test_a_fill_without_words_stays_without(submit, client, handles, llm):
    """The LLM would make words up, or ask for some, and these would be generated."""
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(file, "PNG")
    erased = base64.b64encode(file.getvalue()).decode()
    told = (await submit(prompt="", image=erased, prompt_upsampling=True)).json()
    assert told["details"]["warnings"] == ["prompt_upsampling has no effect on tiny"]
    await end_of(client, told["id"])
    assert (handles.requests[0].prompt, llm.asked) == ("", [])


async def test_another_attempt_has_the_same_words(submit, client, handles, llm):
    handles.failures = [ReplicaFailed("lost")] * 3
    told = (await submit(prompt_upsampling=True)).json()
    await end_of(client, told["id"])
    assert [each.prompt for each in handles.requests] == [DETAILED] * 4
    assert len(llm.asked) == 1


async def test_sent_again_it_is_the_same_job(submit, client, handles, llm):
    headers = {"idempotency-key": "mine"}
    first = (await submit(prompt_upsampling=True, headers=headers)).json()
    again = (await submit(prompt_upsampling=True, headers=headers)).json()
    assert first["id"] == again["id"]
    assert len(llm.asked) == 1


async def test_a_job_is_taken_though_the_llm_fails(submit, client, llm):
    llm.status = 500
    told = (await submit(prompt_upsampling=True)).json()
    [warning] = told["details"]["warnings"]
    assert warning.startswith("prompt_upsampling had no effect, and the prompt was used as sent")
    assert (await end_of(client, told["id"]))["result"]["prompt"] == "a ring"


async def test_a_tier_with_a_default_heeds_a_no(router, args_with, desk, llm):
    args = args_with(tiers={"tiny": {"by_default": True}})
    transport = httpx.ASGITransport(app=build_api(router, args, job_service=desk))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for sent, prompt in (({"disable_pup": True}, "a ring"), ({}, DETAILED)):
            answer = await client.post("/v1/tiny", json={"prompt": "a ring"} | sent)
            assert (await end_of(client, answer.json()["id"]))["result"]["prompt"] == prompt
