"""A size that `tiny` cannot generate is generated as it does best, and scaled: on every dialect."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ray.catalog.tiers import TIERS, tier_for
from flux_ray.errors import BadRequest
from flux_ray.gateway.fields.sizes import check_scaled, generated_size, generates

PATH = "/v1/images/generations"
TINY = tier_for("tiny")
SIZES = {"1024x1024": (128, 128), "512x512": (128, 128), "1792x1024": (192, 112), "100x128": None}


@pytest.mark.parametrize(("size", "generated"), SIZES.items())
async def test_the_answer_has_the_size_that_was_asked_for(client, handles, size, generated):
    answer = await client.post(PATH, json={"prompt": "a ring", "size": size})
    assert answer.status_code == 200, answer.text
    body, [request] = answer.json(), handles.requests
    assert body["size"] == size
    assert "{}x{}".format(*request.encoding.scaled_to) == size
    if generated is not None:
        assert (request.width, request.height) == generated
    [warning] = body["warnings"]
    assert f"scaled from that to {size}" in warning
    num_tokens = request.width * request.height // 256
    assert body["usage"]["output_tokens"] == num_tokens, "priced by what is generated"


async def test_a_size_that_it_generates_is_left_alone(client, handles):
    answer = await client.post(PATH, json={"prompt": "a ring", "size": "192x64"})
    assert answer.json()["warnings"] == []
    assert handles.requests[0].encoding.scaled_to is None


async def test_hugging_faces_clients_get_their_size_too(client, handles):
    body = {"inputs": "a ring", "parameters": {"width": 1024, "height": 1024}}
    answer = await client.post("/models/tiny", json=body)
    assert answer.status_code == 200
    assert "scaled from that to 1024x1024" in answer.headers["x-flux-warnings"]
    assert handles.requests[0].output_size == (1024, 1024)


async def test_an_edit_under_a_mask_gets_its_size_too(client, handles, make_image):
    """The mask and the image that it is of are scaled to the size that is generated."""
    body = {"prompt": "a ring", "size": "1024x1024"}
    for name, color in (("image", "red"), ("mask", "white")):
        body[name] = base64.b64encode(make_image(512, 512, color=color)).decode()
    answer = await client.post("/v1/images/edits", json=body)
    assert answer.status_code == 200, answer.text
    [request] = handles.requests
    assert (request.width, request.height, request.output_size) == (128, 128, (1024, 1024))
    assert (request.mask.width, request.mask.height) == (128, 128)
    assert (request.references[0].width, request.references[0].height) == (128, 128)


async def test_models_tell_their_sides(client):
    [model] = (await client.get("/v1/models")).json()["data"]
    assert (model["min_side"], model["max_side"], model["scales_sizes"]) == (64, 192, True)


SIDES = st.integers(1, 5000)


@given(width=SIDES, height=SIDES)
def test_what_may_be_asked_for_is_generated_in_nearly_its_shape(width, height):
    try:
        check_scaled(width, height, TINY, ("width", "height"))
    except BadRequest:
        assert not generates(width, height, TINY)
        return
    size = generated_size(width, height, TINY)
    assert generates(*size, TINY)
    if generates(width, height, TINY):
        assert size == (width, height)
    elif 1 / 3 <= width / height <= 3:
        assert size[0] / size[1] == pytest.approx(width / height, rel=0.07)


@pytest.mark.parametrize("tier", [t for t in TIERS if not t.scales_sizes], ids=lambda t: t.name)
def test_larger_models_generate_what_they_are_asked_for(tier):
    assert not tier.name.startswith("tiny")
    assert generated_size(1000, 1000, tier) == (1000, 1000)
