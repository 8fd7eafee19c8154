"""The URL of an answer is a reference of the next request, and no network is asked for it."""

from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI

from flux_ray.config.gateway import Fetching, GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.jobs.images import ResultMissing
from flux_ray.request import GeneratedImage, ImageResult, StageTimes
from tests.conftest import LIMITS

PUBLIC = "http://10.1.2.3:8000/at"
BODY = {"prompt": "a ring", "model": "tiny"}


class NoNetwork(Fetcher):
    """Says what it was asked for."""

    def __init__(self) -> None:
        super().__init__(Fetching())
        self.asked: list[str] = []

    async def read(self, url: str, max_bytes: int, name: str, until_s: float) -> bytes:
        self.asked.append(url)
        return await super().read(url, max_bytes, name, until_s)


@pytest.fixture
def gateway_args(job_args) -> GatewayArgs:
    return GatewayArgs(tiers=("tiny",), limits=LIMITS, jobs=job_args, public_url=PUBLIC)


@pytest.fixture
def network() -> NoNetwork:
    return NoNetwork()


@pytest.fixture
def api(router, gateway_args, desk, network) -> FastAPI:
    return build_api(router, gateway_args, job_service=desk, fetcher=network)


@pytest.fixture
async def url(client, handles, make_image, monkeypatch) -> str:
    """Of a red image that was generated a moment ago."""
    red = GeneratedImage(make_image(96, 80), 7)

    async def generate(request, replica, on_event=None) -> ImageResult:
        handles.requests.append(request)
        return ImageResult(request.request_id, "tiny", (red,), StageTimes(0, 0, 0, 0))

    monkeypatch.setattr(handles, "generate", generate)
    answer = await client.post("/v1/images/generations", json=BODY | {"response_format": "url"})
    handles.requests.clear()
    signed: str = answer.json()["data"][0]["url"]
    return signed


@pytest.mark.parametrize("host", [PUBLIC, "http://localhost:8000", "https://flux.example.com/x"])
async def test_an_edit_of_an_earlier_result(client, handles, network, url, host):
    """By whatever host the client reaches this server."""
    sent = url.replace(PUBLIC, host)
    answer = await client.post("/v1/images/edits", json=BODY | {"image": sent})
    assert answer.status_code == 200, answer.text
    [reference] = handles.requests[0].references
    assert (reference.width, reference.height, reference.rgb[:3]) == (96, 80, b"\xff\0\0")
    assert network.asked == []


async def test_every_dialect_reads_it(client, handles, network, url):
    hub = {"inputs": url, "parameters": {"prompt": "a ring"}}
    assert (await client.post("/models/tiny", json=hub)).status_code == 200
    job = await client.post("/v1/tiny", json={"prompt": "a ring", "input_image": url})
    assert job.status_code == 200
    assert network.asked == []


async def test_it_is_read_where_nothing_is_fetched(router, gateway_args, desk, url, handles):
    args = gateway_args.model_copy(update={"fetch": Fetching(enabled=False)})
    transport = httpx.ASGITransport(app=build_api(router, args, job_service=desk))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.post("/v1/images/edits", json=BODY | {"image": url})
    assert answer.status_code == 200


@pytest.mark.parametrize("wrong", ["sig=0", "another name", "no signature", "over"])
async def test_a_url_that_is_not_signed_by_us_is_not_read(client, handles, network, url, wrong):
    parts = urlsplit(url)
    sent = {
        "sig=0": url[:-8] + "00000000",
        "another name": url.replace("/0-0.", "/0-1."),
        "no signature": url.partition("?")[0],
        "over": url.replace(parts.query.partition("&")[0], "exp=1000000000"),
    }[wrong]
    assert sent != url
    answer = await client.post("/v1/images/edits", json=BODY | {"image": sent})
    assert answer.status_code == 400
    assert "none of this server's results" in answer.json()["error"]["message"]
    elsewhere = sent.replace(PUBLIC, "http://127.0.0.1")
    answer = await client.post("/v1/images/edits", json=BODY | {"image": elsewhere})
    assert "not that of a public" in answer.json()["error"]["message"]
    assert (network.asked, handles.requests) == ([elsewhere], [])


async def test_a_result_that_is_gone_is_said_to_be(client, desk, url, monkeypatch):
    async def gone(name: str) -> bytes:
        raise ResultMissing(name)

    monkeypatch.setattr(desk, "read_by_name", gone)
    answer = await client.post("/v1/images/edits", json=BODY | {"image": url})
    assert answer.status_code == 400
    assert "not kept any more" in answer.json()["error"]["message"]


async def test_a_url_as_long_as_a_body_is_not_kept(client):
    """Python remembers the last URLs that it split."""
    sizes = set()
    for number in range(3):
        long = f"http://8.8.8.8/{number}" + "a" * 5000
        answer = await client.post("/v1/images/edits", json=BODY | {"image": long})
        assert answer.status_code == 400
        sizes.add(urlsplit.cache_info().currsize)
    assert len(sizes) == 1
