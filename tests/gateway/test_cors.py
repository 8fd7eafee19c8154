"""Pages in a browser may ask where the gateway's args allow their origin."""

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from flux_ray.auth.keys import KeyFile, write_keys
from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from tests.conftest import LIMITS

PATH = "/v1/images/generations"
PAGE = "https://app.example.com"
BODY = {"prompt": "a ring", "seed": 7}
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


@pytest.fixture
def origins() -> tuple[str, ...]:
    return (PAGE, "http://localhost:3000")


@pytest.fixture
def gateway_args(tmp_path, origins) -> GatewayArgs:
    """With keys, which no preflight has."""
    path = tmp_path / "keys.yaml"
    write_keys(path, KeyFile(keys=()))
    return GatewayArgs(tiers=("tiny",), limits=LIMITS, keys_file=path, cors_origins=origins)


@pytest.fixture
def open_api(router, origins) -> FastAPI:
    args = GatewayArgs(tiers=("tiny",), limits=LIMITS, cors_origins=origins)
    return build_api(router, args)


@pytest.fixture
def open_client(open_api) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=open_api, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


@pytest.mark.parametrize("path", [PATH, "/v1/images/edits", "/models/tiny", "/v1/models"])
async def test_a_preflight_needs_no_key(client, path):
    answer = await client.options(path, headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in ("authorization", "content-type", "x-stainless-os"))


async def test_a_page_of_an_origin_that_is_not_named_may_not_ask(client, open_client):
    headers = PREFLIGHT | {"origin": "https://evil.example.com"}
    assert (await client.options(PATH, headers=headers)).status_code == 400
    answer = await open_client.post(PATH, json=BODY, headers={"origin": headers["origin"]})
    assert "access-control-allow-origin" not in answer.headers


async def test_answers_can_be_read_with_their_headers(open_client):
    answer = await open_client.post(PATH, json=BODY, headers={"origin": PAGE})
    assert (answer.status_code, answer.headers["x-flux-seed"]) == (200, "7")
    assert answer.headers["access-control-allow-origin"] == PAGE
    shown = answer.headers["access-control-expose-headers"].split(", ")
    assert {"x-flux-seed", "x-flux-model", "x-flux-warnings", "retry-after"} <= set(shown)
    assert "origin" in answer.headers["vary"].lower()


async def test_refusals_can_be_read_too(client, open_client, turns):
    headers = {"origin": PAGE}
    refused = [
        await client.post(PATH, json=BODY, headers=headers),
        await open_client.post(PATH, json=BODY | {"user": "x" * 2_000_000}, headers=headers),
        await open_client.post(PATH, json=BODY | {"model": "no"}, headers=headers),
        await open_client.get("/nothing", headers=headers),
    ]
    assert [answer.status_code for answer in refused] == [401, 413, 404, 404]
    for answer in refused:
        assert answer.headers["access-control-allow-origin"] == PAGE


async def test_streams_can_be_read_too(open_client):
    body = BODY | {"stream": True}
    answer = await open_client.post(PATH, json=body, headers={"origin": PAGE})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origins", [("*",)])
async def test_all_pages_may_ask_where_the_operator_says_so(client, open_client):
    assert (await client.options(PATH, headers=PREFLIGHT)).status_code == 200
    answer = await open_client.post(PATH, json=BODY, headers={"origin": "http://any"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origins", [()])
async def test_no_page_may_ask_unless_the_operator_says_so(open_client):
    answer = await open_client.options(PATH, headers=PREFLIGHT)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin", ["https://app.example.com/", "app.example.com", "https://*.example.com", ""]
)
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(origin):
    with pytest.raises(ValidationError, match="cors_origins"):
        GatewayArgs(tiers=("tiny",), cors_origins=(origin,))
