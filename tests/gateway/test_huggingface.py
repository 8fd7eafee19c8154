"""Hugging Face's raw endpoint, by hand; its own client is in tests/cluster."""

import base64

import pytest

from flux_ray.errors import Overloaded

PATH = "/models/tiny"
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode()
SQUARE = {"width": 64, "height": 64}


@pytest.fixture
def ask(client):
    async def ask(inputs, headers=None, path=PATH, **parameters):
        body = {"inputs": inputs, "parameters": parameters}
        return await client.post(path, json=body, headers=headers or {})

    return ask


async def test_words_become_one_image(ask, handles):
    answer = await ask("a ring", width=96, height=64, num_inference_steps=3, seed=7)
    assert answer.status_code == 200, answer.text
    assert (answer.content, answer.headers["content-type"]) == (b"image 7", "image/png")
    assert (answer.headers["x-flux-model"], answer.headers["x-flux-seed"]) == ("tiny", "7")
    (request,) = handles.requests
    assert (request.prompt, request.width, request.height) == ("a ring", 96, 64)
    assert (request.num_steps, request.seed, request.encoding.format) == (3, 7, "png")


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
async def test_an_image_is_edited(ask, handles, make_image, prefix):
    sent = prefix + base64.b64encode(make_image(96, 80)).decode()
    answer = await ask(sent, prompt="make it red", target_size={"width": 64, "height": 64})
    assert answer.status_code == 200, answer.text
    (request,) = handles.requests
    assert request.prompt == "make it red"
    assert [(each.width, each.height) for each in request.references] == [(96, 80)]
    assert (request.width, request.height) == (64, 64)


@pytest.mark.parametrize(
    ("accept", "form"),
    [("image/jpeg", "jpeg"), ("text/html, image/webp;q=1", "webp"), ("*/*", "png")],
)
async def test_the_format_is_what_the_client_accepts(ask, handles, accept, form):
    answer = await ask("a ring", headers={"accept": accept})
    assert answer.headers["content-type"] == f"image/{form}"
    assert handles.requests[0].encoding.format == form


async def test_what_has_no_effect_is_said(ask):
    answer = await ask("a ring", scheduler="DDIM", guidance_scale=3, **{"größe\n": 1})
    said = answer.headers["x-flux-warnings"]
    assert "guidance_scale has no effect on tiny" in said
    assert "scheduler" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("inputs", "parameters", "status", "words"),
    [
        ("", {}, 400, "inputs is empty"),
        ("a" * 1001, {}, 400, "inputs is longer than 1000 characters"),
        (PNG, {"prompt": " "}, 400, "prompt is empty"),
        ("a ring", {"height": "tall"}, 400, "height: input should be a valid integer"),
        ("a ring", {"image_prompt": "aGk="}, 400, "image_prompt: an image is sent as inputs"),
        ("a ring", {"image_width": 8, "h": 64}, 400, "image_width: width and height must be"),
        ("a ring", {"width": 96, "target_size": SQUARE}, 400, "width and target_size disagree"),
        ("a ring", {"width": 100, "height": 8}, 400, "16 to 4096"),
        ("a ring", {"n": 2}, 400, "n is not for this route"),
        ("a ring", {"image": "aGk="}, 400, "an image is sent as inputs"),
        ("a ring", {"images": ["aGk="]}, 400, "an image is sent as inputs"),
        (PNG, {}, 400, "what to do with the image"),
        (PNG, {"num_inference_steps": 4}, 400, "what to do with the image"),
        (f"data:image/png;base64,{PNG}", {}, 400, "what to do with the image"),
        ("a ring", {"mask": "aGVsbG8="}, 400, "a mask comes with the image"),
        ("a ring", {"mask_image": "aGVsbG8="}, 400, "a mask comes with the image"),
        ("a ring", {"control_image": "aGVsbG8="}, 400, "control_image: tiny does not heed it"),
        ("a ring", {"negative_prompt": "a dot"}, 400, "negative_prompt: tiny does not heed it"),
        ("a ring", {"num_inference_steps": 0}, 400, "num_inference_steps"),
        ("no base64!", {"prompt": "x"}, 400, "inputs: image 1 is neither base64 nor a URL"),
        ("aGVsbG8=", {"prompt": "x"}, 400, "not a PNG, JPEG or WebP"),
        ("A" * 400_000, {"prompt": "x"}, 400, "larger than"),
        ("http://127.0.0.1/x.png", {"prompt": "x"}, 400, "not that of a public"),
        ("", {"prompt": "x"}, 400, "not a PNG, JPEG or WebP"),
        ("a ring", {"target_size": {"width": 64}}, 400, "parameters"),
    ],
)
async def test_mistakes_are_told_in_its_words(ask, handles, inputs, parameters, status, words):
    answer = await ask(inputs, **parameters)
    assert answer.status_code == status
    assert words in answer.json()["error"], answer.text
    assert handles.requests == []


@pytest.mark.parametrize("start", ["/9j/", "UklGR", "iVBORw0KGgo"])
async def test_words_that_begin_like_an_image_are_words(ask, handles, start):
    assert (await ask(f"{start} is how an image begins in base64, as nobody knows")).is_success
    assert handles.requests[0].prompt.startswith(start)


async def test_one_side_alone_is_a_square(ask, handles):
    for fields in ({"width": 96}, {"height": 96}):
        assert (await ask("a ring", **fields)).status_code == 200
    assert {(each.width, each.height) for each in handles.requests} == {(96, 96)}


async def test_what_is_beside_the_parameters(client, handles):
    body = {"inputs": "a ring", "parameters": None, "options": {"use_cache": False}, "tint": 7}
    answer = await client.post(PATH, json=body)
    assert answer.headers["x-flux-warnings"] == "unknown field 'tint' was ignored"
    for name in ("image", "mask"):
        answer = await client.post(PATH, json={"inputs": "a ring", name: "aGk="})
        assert (answer.status_code, len(handles.requests)) == (400, 1)
    nothing = {"image": None, "url": "", "images": []}
    body = {"inputs": "a ring", "parameters": nothing, "seed": None, **nothing}
    answer = await client.post(PATH, json=body)
    assert (answer.status_code, "x-flux-warnings" in answer.headers) == (200, False)


async def test_an_unknown_model_and_a_refusal(ask, turns):
    answer = await ask("a ring", path="/models/black-forest-labs/FLUX.1-dev")
    assert (answer.status_code, answer.json()["error_type"]) == (404, "model_not_found")
    turns.refusals = [Overloaded("too late", None, 7)]
    answer = await ask("a ring")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.headers["x-should-retry"] == "true"
