"""What attackers send to the routes of jobs: refused, cheaply, with nothing of our insides."""

import base64
from typing import Any

import httpx
import pytest

from flux_ray.config.gateway import GatewayArgs, JobArgs
from flux_ray.gateway.api import build_api
from tests.conftest import LIMITS
from tests.gateway.fake_desk import FakeDesk
from tests.gateway.test_hostile import FILES, INSIDES, TEXTS, VALUES

KEY = {"x-key": "k"}
URLS = (
    "http://169.254.169.254/latest/meta-data",
    "http://2130706433/",
    "http://0177.0.0.1/",
    "http://[::ffff:127.0.0.1]/",
    "file:///etc/passwd",
)
IDS = (
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "x' OR '1'='1",
    "00000000-0000-4000-8000-000000000000",
    "\x00",
    "é" * 50,
    "a\r\nx-evil: 1",
)


@pytest.fixture
def api(router):
    args = GatewayArgs(tiers=("tiny",), limits=LIMITS, public_url="http://gateway", jobs=JobArgs())
    return build_api(router, args, job_service=FakeDesk())


async def check(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    """Submits it; the answer is BFL's error."""
    answer = await client.post("/v1/tiny", json={"prompt": "a ring"} | fields, headers=KEY)
    assert answer.status_code in (413, 422), answer.text
    assert answer.json().keys() == {"detail", "message"}
    assert len(answer.content) < 1000
    assert [word for word in INSIDES if word in answer.text] == []
    return answer


@pytest.mark.parametrize("name", FILES)
async def test_files(client, name):
    sent = base64.b64encode(FILES[name]).decode() or "="
    answer = await check(client, input_image=sent)
    assert answer.json()["detail"][0]["loc"] == ["body", "input_image"]


@pytest.mark.parametrize("name", TEXTS)
async def test_texts(client, name):
    await check(client, input_image_2=TEXTS[name])


@pytest.mark.parametrize("name", VALUES)
async def test_values(client, name):
    await check(client, input_image=VALUES[name])


@pytest.mark.parametrize("path", ["/v1/tiny", "/v1/images/generations", "/models/tiny"])
async def test_a_body_of_many_small_values(client, path):
    body = b'{"prompt": "x", "inputs": "x", "y": [' + b"[]," * 200_000 + b"[]]}"
    headers = KEY | {"content-type": "application/json"}
    answer = await client.post(path, content=body, headers=headers)
    assert answer.status_code == 400
    assert "too many values" in answer.text


@pytest.mark.parametrize("url", URLS)
async def test_urls(client, url):
    await check(client, input_image=url)


@pytest.mark.parametrize("job_id", IDS)
async def test_ids(client, job_id):
    for method, path in (("GET", "/v1/get_result"), ("POST", "/v1/cancel")):
        answer = await client.request(method, path, params={"id": job_id}, headers=KEY)
        assert (answer.status_code, answer.json()["status"]) == (404, "Task not found")
        assert "x-evil" not in answer.headers
    assert (await client.get("/v1/get_result", params={"id": "a" * 201})).status_code == 422


@pytest.mark.parametrize("sent", ["a b", "a" * 256, "é", ""])
async def test_idempotency_keys(client, sent):
    headers = KEY | {"idempotency-key": sent.encode()}
    answer = await client.post("/v1/tiny", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == 422


@pytest.mark.parametrize("host", ["evil.test", "x/?", "a@b", ""])
async def test_hosts(client, host):
    answer = await client.post("/v1/tiny", json={"prompt": "x"}, headers=KEY | {"host": host})
    assert answer.status_code == 200
    assert answer.json()["polling_url"].startswith("http://gateway/v1/get_result?id=")


async def test_the_secret_of_a_webhook_is_not_shown(client):
    fields = {"webhook_url": "https://example.com/x", "webhook_secret": "hush-hush"}
    answer = await client.post("/v1/tiny", json={"prompt": "x"} | fields, headers=KEY)
    assert answer.status_code == 200
    assert "hush" not in answer.text
