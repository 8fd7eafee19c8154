"""JSON of any kind, in every dialect: an answer or an error of ours, soon."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ray.config.gateway import Fetching, GatewayArgs
from flux_ray.errors import BadRequest, FluxError
from flux_ray.gateway.bfl.fields import BflFields, parse_body
from flux_ray.gateway.fields.sent import parse_object
from flux_ray.gateway.openai.fields import ImageFields
from tests.conftest import LIMITS
from tests.fuzz.mutations import FUZZ, mutated, within_budget

pytestmark = pytest.mark.slow

NAMES = sorted({*ImageFields.model_fields, *BflFields.model_fields})
NAMES += ["control_image", "image_prompt"]
NAMES += ["image", "images", "image[]", "mask", "input_image", "inputs", "parameters", "steps"]
NAMES += ["target_size", "extra_body", "strength", "num_images", "webhook_url", "prompt"]
WORDS = ["auto", "64x64", "1e999", "png", "url", "tiny", "best", "16:9", "1 MP", "data:,", "\0", ""]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 64, 2**31, 2**63, 2**64, 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=30),
    st.sampled_from(WORDS),
    st.sampled_from(WORDS).map(lambda word: word * 5000),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=9)), inner, max_size=4),
    ),
    max_leaves=12,
)
OBJECTS = st.builds(
    lambda prompt, others: {**prompt, **others},
    st.sampled_from([{}, {"prompt": "a ring"}, {"inputs": "a ring"}]),
    st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=9)), VALUES, max_size=6),
)
WRITTEN = [
    json.dumps(each).encode()
    for each in (
        {"prompt": "a ring", "size": "64x64", "n": 2, "seed": 5, "stream": False},
        {"inputs": "a ring", "parameters": {"target_size": {"width": 64, "height": 64}}},
        {"prompt": "\ud83d\ude00", "image": "aGVsbG8=", "metadata": {"a": "b"}, "x": [1e5, None]},
    )
]
ROUTES = ("/v1/images/generations", "/v1/images/edits", "/models/tiny")
JSON = {"content-type": "application/json"}


@pytest.fixture
def gateway_args() -> GatewayArgs:
    """No image is fetched: what is written like a URL must not leave this machine."""
    return GatewayArgs(tiers=("tiny",), limits=LIMITS, fetch=Fetching(enabled=False))


@pytest.mark.parametrize("route", ROUTES)
@FUZZ
@given(OBJECTS)
async def test_fields(client, route, fields):
    for _ in within_budget():
        answer = await client.post(route, json=fields)
    assert answer.status_code < 500, answer.text


@FUZZ
@given(OBJECTS)
def test_bfl_fields(fields):
    for _ in within_budget():
        try:
            parse_body(json.dumps(fields).encode())
        except FluxError as error:
            assert isinstance(error, BadRequest)


@FUZZ
@given(st.one_of(mutated(WRITTEN), st.binary(max_size=200)))
def test_objects(body):
    for _ in within_budget():
        try:
            assert isinstance(parse_object(body), dict)
        except FluxError as error:
            assert isinstance(error, BadRequest)


@pytest.mark.parametrize("route", ROUTES)
@FUZZ
@given(mutated(WRITTEN))
async def test_bodies(client, route, body):
    for _ in within_budget():
        answer = await client.post(route, content=body, headers=JSON)
    assert answer.status_code < 500, answer.text
