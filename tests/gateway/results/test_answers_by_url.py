"""`response_format: url`, with the official client: kept images instead of their bytes."""

import base64

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError

from flux_ray.config.gateway import Alias, GatewayArgs
from flux_ray.errors import StoreLost
from flux_ray.gateway.api import build_api
from tests.conftest import LIMITS


@pytest.fixture
def gateway_args(job_args):
    return GatewayArgs(tiers=("tiny",), limits=LIMITS, jobs=job_args, public_url="http://public/at")


@pytest.fixture
def api(router, gateway_args, desk):
    return build_api(router, gateway_args, job_service=desk)


def client_of(api):
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api))
    return AsyncOpenAI(
        base_url="http://gateway/v1", api_key="any", http_client=http_client, max_retries=0
    )


@pytest.fixture
async def openai(api):
    async with client_of(api) as client:
        yield client


async def read(client, url):
    """As a proxy sends it on that takes `/at` away."""
    assert url.startswith("http://public/at/results/")
    return await client.get(url.removeprefix("http://public/at"))


async def test_generate(openai, client):
    answer = await openai.images.generate(
        model="tiny",
        prompt="a ring",
        n=2,
        response_format="url",
        extra_body={"seed": 7, "output_format": "webp"},
    )
    assert [image.b64_json for image in answer.data] == [None, None]
    assert [image.model_extra["seed"] for image in answer.data] == [7, 8]
    shown = [await read(client, image.url) for image in answer.data]
    assert [each.content for each in shown] == [b"image 7", b"image 8"]
    assert {each.headers["content-type"] for each in shown} == {"image/webp"}


async def test_edit(openai, client, make_image):
    answer = await openai.images.edit(
        model="tiny", prompt="x", image=("in.png", make_image()), response_format="url"
    )
    shown = await read(client, answer.data[0].url)
    assert shown.content == b"image %d" % answer.data[0].model_extra["seed"]


async def test_the_default_and_b64_are_as_before(openai, client):
    for fields in ({}, {"response_format": "b64_json"}):
        answer = await openai.images.generate(
            model="tiny", prompt="a ring", extra_body={"seed": 7}, **fields
        )
        assert answer.data[0].url is None
        assert base64.b64decode(answer.data[0].b64_json) == b"image 7"
    body = {"prompt": "a ring", "response_format": "url"}
    plain = (await client.post("/v1/images/generations", json=body)).json()
    assert {*plain["data"][0]} == {"url", "seed"}


async def test_clients_of_dall_e_read_urls_unless_they_ask_otherwise(router, gateway_args, desk):
    args = gateway_args.model_copy(update={"aliases": {"dall-e-3": Alias(tiers=("tiny",))}})
    api = build_api(router, args, job_service=desk)
    async with client_of(api) as openai:
        answer = await openai.images.generate(model="dall-e-3", prompt="a ring")
        assert (answer.data[0].b64_json, answer.data[0].url[:18]) == (None, "http://public/at/r")
        for fields in ({"model": "tiny"}, {"model": "dall-e-3", "response_format": "b64_json"}):
            answer = await openai.images.generate(prompt="a ring", **fields)
            assert (answer.data[0].url, bool(answer.data[0].b64_json)) == (None, True)


async def test_clients_of_dall_e_get_bytes_where_nothing_is_kept(router):
    api = build_api(
        router, GatewayArgs(tiers=("tiny",), limits=LIMITS, aliases={"dall-e-3": "tiny"})
    )
    async with client_of(api) as openai:
        answer = await openai.images.generate(model="dall-e-3", prompt="a ring")
    assert answer.data[0].b64_json


async def test_a_stream_has_the_bytes_and_says_so(client):
    body = {"prompt": "a ring", "seed": 7, "response_format": "url", "stream": True}
    answer = await client.post("/v1/images/generations", json=body)
    assert base64.b64encode(b"image 7").decode() in answer.text
    assert "response_format has no effect on a stream" in answer.text


@pytest.mark.parametrize("route", ["generate", "edit"])
async def test_without_a_place_to_keep_them_it_is_a_mistake(router, handles, make_image, route):
    api = build_api(router, GatewayArgs(tiers=("tiny",), limits=LIMITS))
    fields = {} if route == "generate" else {"image": ("in.png", make_image())}
    async with client_of(api) as openai:
        with pytest.raises(BadRequestError, match="keeps no images") as caught:
            await getattr(openai.images, route)(
                model="tiny", prompt="x", response_format="url", **fields
            )
    assert caught.value.param == "response_format"
    assert handles.requests == []


async def test_stores_that_are_away(openai, desk, monkeypatch):
    async def lost(*args):
        raise StoreLost("connection to 10.0.0.7 refused")

    monkeypatch.setattr(desk, "keep", lost)
    with pytest.raises(InternalServerError, match="cannot be kept") as caught:
        await openai.images.generate(model="tiny", prompt="x", response_format="url")
    assert (caught.value.status_code, caught.value.code) == (503, "store_unavailable")
    assert "10.0.0.7" not in str(caught.value)
