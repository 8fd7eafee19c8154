"""The official client understands our answers and our errors."""

import base64

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, InternalServerError, NotFoundError

from flux_ray.errors import TierUnavailable


@pytest.fixture
async def openai(api):
    transport = httpx.ASGITransport(app=api)
    http_client = httpx.AsyncClient(transport=transport)
    async with AsyncOpenAI(
        base_url="http://gateway/v1", api_key="any", http_client=http_client, max_retries=0
    ) as client:
        yield client


async def test_generate(openai):
    answer = await openai.images.generate(
        model="tiny", prompt="a red circle", n=2, size="128x128", extra_body={"seed": 7}
    )
    images = [base64.b64decode(image.b64_json) for image in answer.data]
    assert images == [b"image 7", b"image 8"]
    assert answer.data[1].model_extra["seed"] == 8
    assert (answer.size, answer.output_format) == ("128x128", "png")
    assert answer.usage.output_tokens == 128


async def test_edit(openai, handles, make_image):
    one = ("in.png", make_image(color="red"))
    await openai.images.edit(model="tiny", prompt="make it green", image=one)
    two = ("in.png", make_image(color="blue"))
    answer = await openai.images.edit(
        model="tiny", prompt="both", image=[one, two], extra_body={"seed": 5, "steps": 2}
    )
    assert base64.b64decode(answer.data[0].b64_json) == b"image 5"
    assert [len(request.references) for request in handles.requests] == [1, 2]
    assert handles.requests[1].num_steps == 2


async def test_edit_of_a_part(openai, handles, make_image):
    mask = ("mask.png", make_image(mode="RGBA", color=(0, 0, 0, 0)))
    one, two = (("in.png", make_image(color=color)) for color in ("red", "blue"))
    for image in (one, [one, two]):
        await openai.images.edit(model="tiny", prompt="green", image=image, mask=mask)
    assert [len(request.references) for request in handles.requests] == [1, 2]
    assert {request.mask.marks for request in handles.requests} == {b"\xff" * 96 * 80}
    with pytest.raises(BadRequestError) as caught:
        wrong = ("mask.png", make_image(64, 64, color="white"))
        await openai.images.edit(model="tiny", prompt="green", image=one, mask=wrong)
    assert fields_of(caught.value) == ("mask", "invalid_value", "invalid_request_error")


async def test_models(openai):
    models = [model async for model in openai.models.list()]
    assert [model.id for model in models] == ["tiny"]
    assert (await openai.models.retrieve("tiny")).owned_by == "flux-ray"


def fields_of(error: APIStatusError) -> tuple[str | None, str | None, str | None]:
    return error.param, error.code, error.type


async def test_errors(openai, handles):
    with pytest.raises(NotFoundError) as caught:
        await openai.images.generate(
            model="dall-e-3", prompt="a ring", extra_headers={"x-request-id": "mine"}
        )
    assert fields_of(caught.value) == ("model", "model_not_found", "invalid_request_error")
    assert caught.value.request_id == "mine"
    with pytest.raises(BadRequestError) as caught:
        await openai.images.generate(model="tiny", prompt="a ring", size="100x")
    assert fields_of(caught.value) == ("size", "invalid_value", "invalid_request_error")
    handles.failures = [TierUnavailable("tiny cannot serve now", "model")]
    with pytest.raises(InternalServerError) as caught:
        await openai.images.generate(model="tiny", prompt="a ring")
    assert fields_of(caught.value) == ("model", "tier_unavailable", "server_error")
