"""Fields that only some tiers heed: heeded by those, refused by name elsewhere, in all dialects.

Rows of the catalogue decide, so the tests change the row of `tiny`.
"""

import base64
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_ray.catalog import Tier, tiers
from flux_ray.catalog.tiers import TINY
from flux_ray.config.gateway import GatewayArgs
from flux_ray.errors import BadRequest
from flux_ray.gateway.bfl.fields import parse_body
from flux_ray.gateway.bfl.request import job_request_for, job_warnings_for
from flux_ray.gateway.images.decode import SentImage
from flux_ray.gateway.images.sources import RequestImages
from flux_ray.gateway.openai.fields import ImageFields, warnings_for
from flux_ray.gateway.openai.request import NEGATIVE_SCALE, request_for
from flux_ray.request import ImageRequest, Mask, RgbImage
from tests.conftest import LIMITS

GENERATIONS, EDITS, HUB = "/v1/images/generations", "/v1/images/edits", "/models/tiny"
PROMPT = {"prompt": "a ring"}
SIZE = (96, 80)
# Rows like those of FLUX.1 dev, of its Fill and Depth models, and of klein's base model.
DEV = replace(TINY, is_guided=True, guidance=3.5, takes_negative=True, max_references=0)
MASKED = replace(DEV, max_references=1, reference_tokens=0)
FILL = replace(TINY, max_references=1, requires_mask=True, takes_strength=False)
DEPTH = replace(TINY, max_references=0, takes_mask=False, takes_control=True)
BASE = replace(TINY, is_guided=True, guidance=4.0, true_cfg_scale=4.0, takes_strength=True)
PLAIN = replace(TINY, name="tiny-tp2", takes_strength=False)


@pytest.fixture
def gateway_args() -> GatewayArgs:
    return GatewayArgs(tiers=("tiny", "tiny-tp2"), default_tier="tiny", limits=LIMITS)


@pytest.fixture
def serve(monkeypatch):
    """Return `serve(row)`, after which `tiny` has that row; `tiny-tp2` heeds nothing of this."""

    def serve(row: Tier) -> None:
        for each in (row, PLAIN):
            monkeypatch.setitem(tiers._BY_NAME, each.name, each)

    return serve


@pytest.fixture
def red(make_image) -> str:
    return base64.b64encode(make_image(*SIZE)).decode()


@pytest.fixture
def left() -> str:
    """A mask, white on its left half."""
    mask = Image.new("L", SIZE, "black")
    mask.paste("white", (0, 0, SIZE[0] // 2, SIZE[1]))
    file = io.BytesIO()
    mask.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def as_job(body: dict[str, Any], row: Tier, images: RequestImages) -> ImageRequest:
    """Return the request that BFL's route makes of a body."""
    return job_request_for(parse_body(json.dumps(body).encode()), "tiny", row, LIMITS, images)


STEERED = [
    # Row, what is sent, and the negative prompt, its scale and the guidance that come of it.
    (DEV, {}, (None, 1.0, 3.5)),
    (DEV, {"negative_prompt": ""}, (None, 1.0, 3.5)),
    (DEV, {"negative_prompt": "a dot"}, ("a dot", NEGATIVE_SCALE, 3.5)),
    (DEV, {"negative_prompt": " a dot ", "true_cfg_scale": 2.5}, (" a dot ", 2.5, 3.5)),
    (DEV, {"negative_prompt": "", "true_cfg_scale": 2}, ("", 2.0, 3.5)),
    (DEV, {"negative": "a dot", "true_cfg": "2", "cfg_scale": 5}, ("a dot", 2.0, 5.0)),
    (BASE, {}, ("", 4.0, 4.0)),
    (BASE, {"guidance_scale": 6}, ("", 6.0, 4.0)),
    (BASE, {"true_cfg_scale": 6, "negative_prompt": " "}, ("", 6.0, 4.0)),
    (BASE, {"guidance_scale": 6, "true_cfg_scale": 6}, ("", 6.0, 4.0)),
    (BASE, {"guidance": 1}, (None, 1.0, 4.0)),
    (TINY, {"guidance": 7}, (None, 1.0, 1.0)),
]


@pytest.mark.parametrize(("row", "fields", "expected"), STEERED)
async def test_a_negative_prompt_steers_where_the_row_says_so(
    client, handles, serve, row, fields, expected
):
    serve(row)
    answers = [
        await client.post(GENERATIONS, json=PROMPT | fields),
        await client.post(HUB, json={"inputs": "a ring", "parameters": fields}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    for request in (*handles.requests, as_job(PROMPT | fields, row, RequestImages())):
        assert (request.negative_prompt, request.true_cfg_scale, request.guidance) == expected
        assert request.num_forwards == 1 + (expected[0] is not None)


@pytest.mark.parametrize(
    ("row", "fields", "warnings"),
    [
        (DEV, {"true_cfg_scale": 3}, ["true_cfg_scale has no effect on tiny"]),
        (
            DEV,
            {"negative": "a dot", "true_cfg_scale": 1},
            ["negative has no effect on tiny"],
        ),
        (DEV, {"negative_prompt": "a dot", "true_cfg_scale": 3, "guidance": 2}, []),
        (BASE, {"guidance_scale": 3}, []),
    ],
)
async def test_what_has_no_effect_alone_is_named(client, serve, row, fields, warnings):
    serve(row)
    answer = await client.post(GENERATIONS, json=PROMPT | fields)
    assert (answer.status_code, answer.json()["warnings"]) == (200, warnings)
    sent, images = parse_body(json.dumps(PROMPT | fields).encode()), RequestImages()
    request = job_request_for(sent, "tiny", row, LIMITS, images)
    said = [each for each in job_warnings_for(sent, "tiny", request, row) if "no effect" in each]
    assert said == warnings


@pytest.mark.parametrize(
    ("row", "fields", "param", "words"),
    [
        (TINY, {"negative_prompt": "a dot"}, "negative_prompt", "nor does any other model"),
        (BASE, {"negative_prompt": "a dot"}, "negative_prompt", "tiny does not heed it"),
        (TINY, {"true_cfg_scale": 3}, "true_cfg_scale", "tiny does not heed it"),
        (BASE, {"guidance": 3, "true_cfg_scale": 4}, "true_cfg_scale", "guidance and true"),
        (DEV, {"negative_prompt": "x" * 1001}, "negative_prompt", "1000 characters"),
        (DEV, {"true_cfg_scale": 101}, "true_cfg_scale", "100"),
        (DEV, {"image_prompt": "RED"}, "image_prompt", "these models here do: tiny-tp2"),
        (TINY, {"control_image": "RED"}, "control_image", "nor does any other model here"),
        (TINY, {"image": "RED", "strength": 0.5}, "strength", ""),
        (BASE, {"image": "RED", "denoise": 0.5}, "denoise", "only under a mask"),
        (BASE, {"image": "RED", "mask": "LEFT", "strength": 0}, "strength", "above 0"),
        (BASE, {"image": "RED", "mask": "LEFT", "strength": 1.5}, "strength", "above 0"),
        (FILL, {}, "image", "image is required: tiny generates a part"),
        (FILL, {"image": "RED"}, "mask", "mask is required: tiny generates a part"),
        (MASKED, {"image": "RED"}, "mask", "takes an image only to generate a part"),
        (MASKED, {"image_prompt": "RED"}, "mask", "takes an image only to generate a part"),
        (DEPTH, {}, "control_image", "control_image is required"),
        (DEPTH, {"control_image": ["RED", "RED"]}, "control_image", "one control image only"),
        (DEPTH, {"control_image": "RED", "image": "RED"}, "control_image", "image only"),
        (DEPTH, {"control_image": "RED", "mask": "LEFT"}, "mask", "does not heed it"),
        (DEPTH, {"control_image": "aGk="}, "control_image", "not a PNG, JPEG or WebP"),
        (DEPTH, {"control_image": 7}, "control_image", "base64 or URLs"),
    ],
)
async def test_what_is_not_heeded_is_refused_by_name(
    client, handles, serve, red, left, row, fields, param, words
):
    serve(row)
    body = json.loads(json.dumps(PROMPT | fields).replace("RED", red).replace("LEFT", left))
    answer = await client.post(GENERATIONS, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], words in error["message"]) == (param, True), error
    assert handles.requests == []


async def test_the_error_names_the_models_of_this_gateway_that_do(client, serve):
    serve(DEV)
    body = PROMPT | {"model": "tiny-tp2", "negative_prompt": "a dot"}
    answer = await client.post(GENERATIONS, json=body)
    assert answer.json()["error"]["message"] == (
        "negative_prompt: tiny-tp2 does not heed it; these models here do: tiny"
    )


async def test_a_part_is_filled_under_a_mask_or_an_alpha_channel(
    client, handles, serve, make_image, red, left
):
    serve(FILL)
    clear = base64.b64encode(make_image(*SIZE, mode="RGBA", color=(255, 0, 0, 0))).decode()
    for sent in ({"image": red, "mask": left}, {"image": clear}):
        answer = await client.post(EDITS, json=PROMPT | sent)
        assert answer.status_code == 200, answer.text
    inputs = {"inputs": red, "parameters": PROMPT | {"mask_image": left}}
    assert (await client.post(HUB, json=inputs)).status_code == 200
    first, second, third = handles.requests
    assert first.mask == third.mask
    assert first.mask.marks[: SIZE[0]] == b"\xff" * 48 + b"\0" * 48
    assert second.mask.marks == b"\xff" * (SIZE[0] * SIZE[1])
    assert {len(each.references) for each in handles.requests} == {1}


async def test_strength_reaches_the_replica_under_a_mask(client, handles, serve, red, left):
    serve(BASE)
    body = PROMPT | {"image": red, "mask": left}
    for name in ("strength", "denoising_strength"):
        answer = await client.post(GENERATIONS, json=body | {name: "0.6"})
        assert (answer.status_code, answer.json()["warnings"]) == (200, [])
    files = {"image": ("a", base64.b64decode(red)), "mask": ("m", base64.b64decode(left))}
    answer = await client.post(EDITS, data=PROMPT | {"strength": "0.6"}, files=files)
    assert answer.status_code == 200
    assert {each.strength for each in handles.requests} == {0.6}


@pytest.mark.parametrize("size", [{}, {"size": "64x64"}])
async def test_a_control_image_is_followed_in_the_size_of_the_answer(
    client, handles, serve, make_image, size
):
    serve(DEPTH)
    edges = make_image(192, 128, mode="L", color=9)
    text = base64.b64encode(edges).decode()
    answers = [
        await client.post(GENERATIONS, json=PROMPT | size | {"control_image": text}),
        await client.post(EDITS, data=PROMPT | size, files={"control_image": ("a", edges)}),
        await client.post(
            HUB, json={"inputs": "a ring", "parameters": size | {"preprocessed_image": text}}
        ),
    ]
    # These models take no other image, so that it may have any name.
    answers += [
        await client.post(EDITS, data=PROMPT | size, files={"image": ("a", edges)}),
        await client.post(HUB, json={"inputs": text, "parameters": PROMPT | size}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 5, answers[-1].text
    for request in handles.requests:
        assert request.follows_reference
        [control] = request.references
        expected = (64, 64) if size else (192, 128)
        assert (control.width, control.height) == (request.width, request.height) == expected
        assert control.rgb[:3] == b"\x09" * 3
    assert len({request.references_name for request in handles.requests}) == 1


async def test_an_image_prompt_is_a_reference(client, handles, red):
    answer = await client.post(GENERATIONS, json=PROMPT | {"image_prompt": red})
    assert (answer.status_code, answer.json()["warnings"]) == (200, [])
    [request] = handles.requests
    assert [(each.width, each.height) for each in request.references] == [SIZE]
    assert not request.follows_reference


async def test_a_key_is_for_one_control_image(client, serve, make_image):
    serve(DEPTH)
    named = {"idempotency-key": "mine"}
    for color, status in (("red", 200), ("red", 200), ("blue", 422)):
        text = base64.b64encode(make_image(*SIZE, color=color)).decode()
        body = PROMPT | {"control_image": text}
        assert (await client.post(GENERATIONS, json=body, headers=named)).status_code == status


@pytest.mark.parametrize("other", [{"negative_prompt": "a star"}, {"true_cfg_scale": 3}])
async def test_a_key_is_for_one_negative_prompt(client, serve, other):
    serve(DEV)
    named, body = {"idempotency-key": "mine"}, PROMPT | {"negative_prompt": "a dot"}
    assert (await client.post(GENERATIONS, json=body, headers=named)).status_code == 200
    assert (await client.post(GENERATIONS, json=body | other, headers=named)).status_code == 422


SCENE = st.recursive(
    st.text(max_size=8) | st.integers(-9, 9) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(SCENE, st.sampled_from([None, 2]), st.booleans(), st.sampled_from(["", " ", "\n\t"]))
def test_a_prompt_that_is_json_passes_verbatim(scene, indent, is_ascii, margin):
    words = margin + json.dumps({"scene": scene}, indent=indent, ensure_ascii=is_ascii) + margin
    fields = ImageFields.read({"prompt": words, "allow_truncation": True})
    request = request_for(
        fields, TINY, LIMITS.model_copy(update={"max_prompt_chars": 10**6}), RequestImages()
    )
    assert (request.prompt, request.has_json) == (words, True)
    sent = parse_body(json.dumps({"prompt": words}).encode())
    assert sent.prompt == words


@pytest.mark.parametrize("path", [GENERATIONS, "/models/tiny"])
async def test_a_prompt_that_is_an_object_is_no_text(client, handles, path):
    """None of the APIs takes one, and there are many ways to write the same object."""
    name = "inputs" if path == HUB else "prompt"
    answer = await client.post(path, json={name: {"scene": "a ring"}})
    assert answer.status_code == 400
    assert handles.requests == []


ROWS = st.builds(
    replace,
    st.just(TINY),
    is_guided=st.booleans(),
    takes_negative=st.booleans(),
    true_cfg_scale=st.sampled_from([1.0, 3.5]),
    takes_strength=st.booleans(),
    takes_control=st.booleans(),
    takes_mask=st.booleans(),
    requires_mask=st.booleans(),
    max_references=st.integers(0, 2),
)
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "negative_prompt": st.sampled_from(["", " ", "a dot"]),
        "true_cfg_scale": st.sampled_from([0, 1, 2.5]),
        "guidance_scale": st.sampled_from([0, 1, 2.5]),
        "strength": st.sampled_from([0, 0.5, 1]),
    },
)
IMAGE = SentImage(*SIZE, {TINY.max_reference_pixels: RgbImage(*SIZE, bytes(SIZE[0] * SIZE[1] * 3))})
MASK = Mask(*SIZE, b"\xff" * (SIZE[0] * SIZE[1]))
IMAGES = st.sampled_from(
    [
        RequestImages(),
        RequestImages((IMAGE,)),
        RequestImages((IMAGE, IMAGE)),
        RequestImages((IMAGE,), MASK),
        RequestImages((IMAGE,), is_control=True),
    ]
)


@given(ROWS, ASKED, IMAGES)
def test_what_is_asked_is_heeded_or_refused_or_named(row, asked, images):
    """Whatever the row and whatever is sent together: nothing is dropped in silence."""
    fields = ImageFields.read(PROMPT | asked)
    try:
        request = request_for(fields, row, LIMITS, images)
    except BadRequest as error:
        assert error.field in {"image", "mask", "control_image", *asked}
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiers._BY_NAME, row.name, row)
        warnings = warnings_for(fields, request)
    named = {warning.split(" ")[0] for warning in warnings}
    is_steered = request.negative_prompt is not None
    assert is_steered <= (request.true_cfg_scale > 1)
    assert is_steered <= (row.takes_negative or row.true_cfg_scale > 1)
    if row.true_cfg_scale > 1:
        sent = {asked[name] for name in ("guidance_scale", "true_cfg_scale") if name in asked}
        assert request.true_cfg_scale in ({max(1, each) for each in sent} or {row.true_cfg_scale})
    if asked.get("negative_prompt") == "a dot" and "negative_prompt" not in named:
        assert request.negative_prompt == "a dot"
    if asked.get("true_cfg_scale") == 2.5 and "true_cfg_scale" not in named:
        assert request.true_cfg_scale == 2.5
    if "guidance_scale" in asked and "guidance_scale" not in named and row.true_cfg_scale == 1:
        assert request.guidance == asked["guidance_scale"]
    if asked.get("strength", 1) != 1 and "strength" not in named:
        assert request.strength == asked["strength"]
        assert row.takes_strength and request.mask is not None
    assert not row.requires_mask or request.mask is not None
    assert request.follows_reference == row.takes_control
