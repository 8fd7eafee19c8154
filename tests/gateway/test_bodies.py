"""Bodies as clients really send them: cut, packed, marked, in other encodings, at other paths."""

import base64
import gzip
import json
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from flux_ray.config.gateway import GatewayArgs, JobArgs, Limits
from flux_ray.errors import BadRequest
from flux_ray.gateway.api import build_api
from flux_ray.gateway.fields.sent import parse_object
from flux_ray.gateway.images.masks import decode_mask, decode_painted_mask
from tests.conftest import LIMITS
from tests.gateway.fake_desk import FakeDesk
from tests.gateway.images.test_masks import LEFT, file_of

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
PROMPT = {"prompt": "make the circle green"}
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=xxBxx"}


def part(name: str, data: bytes, more: str = "") -> bytes:
    head = f'--xxBxx\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + data + b"\r\n"


@pytest.fixture
def form(make_image) -> bytes:
    """Whole, with its mask last."""
    image, mask = make_image(96, 80), make_image(96, 80, color="white")
    parts = [
        part("prompt", b"make the circle green"),
        part("image", image, '; filename="a.png"\r\nContent-Type: image/png'),
        part("mask", mask, '; filename="m.png"\r\nContent-Type: image/png'),
    ]
    return b"".join(parts) + b"--xxBxx--\r\n"


async def test_a_form_that_is_not_whole_is_refused_wherever_it_ends(client, handles, form):
    end = form.rindex(b"--xxBxx--")
    cuts = [end, end + 7, end + 8, end - 2, end - 50, 200, 100, 40, 9, 0]
    for cut in cuts:
        answer = await client.post(EDITS, content=form[:cut], headers=FORM)
        assert answer.status_code == 400, form[cut - 20 : cut]
    answer = await client.post(EDITS, content=form[: end + 7] + b"\r\n", headers=FORM)
    assert "not whole" in answer.json()["error"]["message"]
    assert handles.requests == []
    # Neither the last line break nor what follows counts.
    for whole in (form, form[: end + 9], form + b"an epilogue"):
        assert (await client.post(EDITS, content=whole, headers=FORM)).status_code == 200
        assert handles.requests.pop().mask is not None


@pytest.mark.parametrize("charset", ["punycode", "latin-1", "utf-16", '"PunyCode"', "utf-7"])
async def test_a_form_is_decoded_as_utf_8_only(client, handles, form, charset):
    kind = f"{FORM['content-type']}; charset={charset}"
    answer = await client.post(EDITS, content=form, headers={"content-type": kind})
    assert (answer.status_code, handles.requests) == (415, [])
    for same in ("utf-8", '"UTF-8"', "utf8"):
        kind = f"{FORM['content-type']}; charset={same}"
        answer = await client.post(EDITS, content=form, headers={"content-type": kind})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("text", "at"), [("ein grüner Kreis".encode("latin-1"), 6), ("grün 🟢".encode()[:-1], 6)]
)
async def test_a_text_of_a_form_that_is_not_utf_8_is_refused(client, handles, make_image, text, at):
    image = part("image", make_image(96, 80), '; filename="a.png"')
    body = image + part("prompt", text) + b"--xxBxx--"
    answer = await client.post(EDITS, content=body, headers=FORM)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], handles.requests) == (400, "prompt", [])
    assert f"prompt: is not UTF-8, at byte {at}" in error["message"]


async def test_a_file_that_was_not_chosen_is_as_none(client, handles, make_image):
    kind = '; filename=""\r\nContent-Type: application/octet-stream'
    body = part("prompt", b"make it green") + part("image", make_image(), '; filename="a.png"')
    for name in ("mask", "image[]", "image2", "mask_image", "style"):
        body += part(name, b"", kind)
    for name in ("size", "n", "output_format", "seed", "model", "stream", "quality"):
        body += part(name, b"")
    answer = await client.post(EDITS, content=body + b"--xxBxx--", headers=FORM)
    assert (answer.status_code, answer.json()["warnings"]) == (200, []), answer.text
    assert handles.requests[0].mask is None
    only = part("prompt", b"x") + part("image", b"", kind) + b"--xxBxx--"
    answer = await client.post(EDITS, content=only, headers=FORM)
    assert answer.json()["error"]["message"] == "image is required"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kind", ["", "\r\nContent-Type: image/png"])
async def test_an_image_part_needs_no_file_name(client, handles, make_image, format, kind):
    body = part("prompt", b"make it green") + part("image", make_image(format=format), kind)
    answer = await client.post(EDITS, content=body + b"--xxBxx--", headers=FORM)
    assert answer.status_code == 200, answer.text
    assert len(handles.requests[0].references) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is empty"),
        ('{"model":"tiny","prompt":"ein grüner Kreis"}'.encode("latin-1"), "not UTF-8, at byte 32"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16, at byte 0"),
        (b'\xef\xbb\xbf{"a":"\xfc"}', "at byte 9"),
        (b'{"prompt": "cut \\ud83d here"}', "prompt: has half of a surrogate pair"),
        (b'{"a": {"b": ["\\udc00"]}}', "b: has half of a surrogate pair"),
        (b'{"prompt": "a",\n "n": }', "line 2 column 7"),
        (b"{'prompt': 1}", "line 1 column 2"),
        (b"[1]", "must be a JSON object"),
        (b"[" * 99_999, "line 1 column"),
    ],
)
def test_errors_of_json_say_what_is_wrong_and_where(body, words):
    with pytest.raises(BadRequest, match=words) as caught:
        parse_object(body)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("path", [GENERATIONS, "/models/tiny", "/v1/tiny"])
async def test_a_byte_order_mark_is_skipped(jobs_client, handles, path):
    body = b"\xef\xbb\xbf" + json.dumps(PROMPT | {"inputs": "a ring"}).encode()
    body = body if path != "/models/tiny" else b'\xef\xbb\xbf{"inputs": "a ring"}'
    assert (await jobs_client.post(path, content=body, headers=JSON)).status_code == 200
    broken = await jobs_client.post(path, content=b'{"prompt": "\\ud800"}', headers=JSON)
    assert broken.status_code == (422 if path == "/v1/tiny" else 400)
    assert "prompt: has half" in broken.text


@pytest.fixture
def named_args() -> GatewayArgs:
    return GatewayArgs(
        tiers=("tiny",),
        limits=LIMITS,
        aliases={"my model": "tiny", "tiny:latest": "tiny", "größe/Ä": "tiny"},
        public_url="https://flux.example/",
        jobs=JobArgs(),
    )


@pytest.fixture
async def jobs_client(router, named_args):
    api = build_api(router, named_args, job_service=FakeDesk())
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.mark.parametrize(
    "name", ["my%20model", "tiny:latest", "tiny%3Alatest", "gr%C3%B6%C3%9Fe/Ä"]
)
async def test_every_alias_has_a_route_for_jobs(jobs_client, name):
    for path in (f"/v1/{name}", f"/proxy/bfl/{name}/generate"):
        answer = await jobs_client.post(path, json=PROMPT)
        assert (answer.status_code, answer.json()["details"]["served_model"]) == (200, "tiny")


@pytest.mark.parametrize(
    "name", ["{x}", "a//b", "/a", "a/", "a/../b", " a", "a\n", "", "a?b", "a#b", "cancel", "models"]
)
def test_an_alias_that_can_have_no_route_is_refused_at_start(name):
    with pytest.raises(ValidationError, match="cannot be its route"):
        GatewayArgs(tiers=("tiny",), aliases={name: "tiny"})


PACKINGS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate, identity": lambda data: zlib.compress(data, wbits=-15),
    "GZIP": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
}


@pytest.mark.parametrize("encoding", PACKINGS)
@pytest.mark.parametrize("path", [GENERATIONS, "/v1/tiny"])
async def test_packed_bodies_are_unpacked(jobs_client, encoding, path):
    body = PACKINGS[encoding](json.dumps(PROMPT).encode())
    headers = JSON | {"content-encoding": encoding}
    answer = await jobs_client.post(path, content=body, headers=headers)
    assert answer.status_code == 200, answer.text


async def test_packed_bodies_come_in_small_pieces(client, handles, form):
    packed = gzip.compress(form)

    async def pieces():
        for start in range(0, len(packed), 7):
            yield packed[start : start + 7]

    headers = FORM | {"content-encoding": "gzip"}
    assert (await client.post(EDITS, content=pieces(), headers=headers)).status_code == 200
    assert handles.requests[0].mask is not None


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "deflate, gzip", "quite odd"])
async def test_other_packings_are_named(jobs_client, encoding):
    headers = JSON | {"content-encoding": encoding}
    for path in (GENERATIONS, "/v1/tiny", "/models/tiny"):
        answer = await jobs_client.post(path, content=b"{}", headers=headers)
        assert answer.status_code == 415
        assert answer.headers["accept-encoding"] == "gzip, deflate, identity"
        assert encoding in answer.text


async def test_a_bomb_is_not_unpacked_beyond_the_limit(client, monkeypatch):
    num_bytes = 0
    inflate = zlib.decompressobj

    class Counting:
        def __init__(self, bits):
            self.inflater = inflate(bits)

        def __getattr__(self, name):
            return getattr(self.inflater, name)

        def decompress(self, data, most):
            nonlocal num_bytes
            piece = self.inflater.decompress(data, most)
            num_bytes += len(piece)
            return piece

    packed = gzip.compress(bytes(200_000_000), 1)
    monkeypatch.setattr("flux_ray.gateway.http.zlib.decompressobj", Counting)
    headers = JSON | {"content-encoding": "gzip"}
    answer = await client.post(GENERATIONS, content=packed, headers=headers)
    assert (answer.status_code, num_bytes <= 3 * 2**20) == (413, True)


@pytest.mark.parametrize("cut", [lambda p: p[:-5], lambda p: p + b"xx", lambda p: b"{}" + p])
async def test_damaged_packings_are_refused(client, handles, cut):
    body = cut(gzip.compress(json.dumps(PROMPT).encode()))
    headers = JSON | {"content-encoding": "gzip"}
    answer = await client.post(GENERATIONS, content=body, headers=headers)
    assert (answer.status_code, handles.requests) == (400, [])
    assert "gzip" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/v1/v1/images/generations", GENERATIONS),
        ("POST", "/images/generations", GENERATIONS),
        ("POST", "/v1//images/generations", GENERATIONS),
        ("POST", "/v1/images/generations/", GENERATIONS),
        ("POST", "/openai/deployments/x/images/edits", EDITS),
        ("GET", "/models", "/v1/models"),
        ("GET", "/v1/v1/models/tiny", "/v1/models/tiny"),
        ("POST", "/v1/v1/tiny", "/v1/tiny"),
        ("POST", "/tiny", "/v1/tiny"),
        ("GET", "/v1/v1/get_result?id=x", "/v1/get_result"),
        ("POST", "/v1/models/tiny", "/models/tiny"),
    ],
)
async def test_a_wrong_base_url_is_told_the_right_one(jobs_client, method, path, meant):
    answer = await jobs_client.request(method, path, json={})
    assert answer.status_code == (405 if path == "/v1/models/tiny" else 404)
    told = answer.json()
    message = told["error"] if meant == "/models/tiny" else told.get("message")
    message = message or told["error"]["message"]
    asked = path.partition("?")[0]
    assert message.startswith(f"there is no {method} {asked} here, but {meant};")
    assert "https://flux.example/v1" in message


async def test_a_path_that_is_nobodys_is_named(client):
    error = (await client.get("/v1/nowhere")).json()["error"]
    assert error["message"].startswith("there is no GET /v1/nowhere here; the base URL")
    assert error["code"] == "not_found"


async def test_who_posts_to_the_server_itself_is_told_where_to_look(client):
    message = (await client.post("/", json={})).json()["error"]["message"]
    for path in ("/v1/models", "/openapi.json"):
        assert f"GET {path} " in message
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", "multipart/form-data"])
async def test_a_raw_image_is_no_body_of_hugging_faces_route(client, make_image, kind):
    headers = {"content-type": kind}
    answer = await client.post("/models/tiny", content=make_image(), headers=headers)
    assert (answer.status_code, kind in answer.json()["error"]) == (415, True)
    assert "base64 as `inputs`" in answer.json()["error"]


@pytest.mark.parametrize("kind", ["", "application/json; charset=utf-8", "text/plain"])
async def test_json_is_read_though_it_is_not_called_so(client, kind):
    body = b'{"inputs": "a ring"}'
    answer = await client.post("/models/tiny", content=body, headers={"content-type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("image/webp;q=0, image/png", "png"),
        ("image/webp;q=0.2, image/jpeg;q=0.9", "jpeg"),
        ("image/jpeg;q=0.5, */*", "png"),
        ("image/avif,image/webp,*/*;q=0.8", "webp"),
        ("image/png;q=0, image/*", "jpeg"),
        ("image/jpg", "jpeg"),
        ("IMAGE/WEBP; Q=1.0", "webp"),
        ("image/webp;q=0", "png"),
        ("image/webp;q=odd", "webp"),
        ("", "png"),
    ],
)
async def test_what_is_accepted_most_is_sent(client, accept, form):
    headers = {"accept": accept}
    answer = await client.post("/models/tiny", json={"inputs": "a ring"}, headers=headers)
    assert answer.headers["content-type"] == f"image/{form}"


@pytest.mark.parametrize("size", ["64x64", {"width": 64}, {"width": "wide", "height": 64}, [64]])
async def test_a_nested_field_is_named_where_it_is_wrong(client, size):
    body = {"inputs": "a ring", "parameters": {"target_size": size}}
    answer = await client.post("/models/tiny", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("parameters.target_size")


@pytest.mark.parametrize("space", ["\n", " ", "\r\n\t"])
async def test_space_around_an_image_is_nothing(client, handles, make_image, space):
    data = f"{space}data:image/png;base64,{text_of(make_image())}{space}"
    assert (await client.post(EDITS, json=PROMPT | {"image": data})).status_code == 200
    answer = await client.post(EDITS, data=PROMPT, files={"image": (None, data)})
    assert answer.status_code == 200
    body = {"inputs": data, "parameters": PROMPT}
    assert (await client.post("/models/tiny", json=body)).status_code == 200
    assert [len(each.references) for each in handles.requests] == [1, 1, 1]
    answer = await client.post(EDITS, json=PROMPT | {"image": f"{space}http://127.0.0.1/a"})
    assert "its URL is not that of a public" in answer.json()["error"]["message"]


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def painted_on_nothing() -> bytes:
    """White in the left half, and transparent black elsewhere."""
    layer = Image.fromarray(np.stack([LEFT] * 4, axis=-1))
    return file_of(layer)


def test_white_on_a_transparent_layer_is_generated_on_bfls_routes():
    """By OpenAI's rule, which its own routes keep, what is transparent is."""
    limits = Limits()
    marks = np.frombuffer(decode_painted_mask(painted_on_nothing(), limits, "mask").marks, np.uint8)
    assert (marks.reshape(LEFT.shape) == LEFT).all()
    marks = np.frombuffer(decode_mask(painted_on_nothing(), limits, "mask").marks, np.uint8)
    assert (marks.reshape(LEFT.shape) == 255 - LEFT).all()


@pytest.mark.parametrize(("model", "is_mask"), [("dall-e-2", True), ("gpt-image-1", False)])
async def test_transparency_is_the_mask_of_dall_e_2_only(router, handles, model, is_mask):
    """Others take a transparent image for a reference of which some parts are empty."""
    args = GatewayArgs(tiers=("tiny",), limits=LIMITS, aliases={model: "tiny"})
    transport = httpx.ASGITransport(app=build_api(router, args))
    erased = Image.new("RGBA", LEFT.shape[::-1], (200, 0, 0, 255))
    erased.putalpha(Image.fromarray(255 - LEFT))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for image in (erased, erased.convert("RGB")):
            body = PROMPT | {"model": model, "image": text_of(file_of(image))}
            body |= {"response_format": "b64_json"}
            answer = await client.post(EDITS, json=body)
            assert answer.status_code == 200, answer.text
    masks = [each.mask for each in handles.requests]
    assert [mask is not None for mask in masks] == [is_mask, False]
    assert not is_mask or masks[0].marks == LEFT.tobytes()


def test_a_mask_that_is_only_erased_is_read_on_bfls_routes_too():
    erased = Image.new("RGBA", LEFT.shape[::-1], (200, 0, 0, 255))
    erased.putalpha(Image.fromarray(255 - LEFT))
    marks = decode_painted_mask(file_of(erased), Limits(), "mask").marks
    assert marks == LEFT.tobytes()
