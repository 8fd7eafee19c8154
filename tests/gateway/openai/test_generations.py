"""`POST /v1/images/generations`: what reaches the router, what comes back, what is refused."""

import base64
from dataclasses import replace

import pytest

from flux_ray.catalog.tiers import tier_for
from flux_ray.errors import BadRequest
from flux_ray.gateway.fields.sizes import check_size
from flux_ray.request import Encoding

PATH = "/v1/images/generations"
PROMPT = "a red circle on a blue background"


async def test_defaults_come_from_the_catalogue(client, handles):
    answer = await client.post(PATH, json={"prompt": PROMPT})
    assert answer.status_code == 200
    [request] = handles.requests
    assert (request.tier, request.prompt) == ("tiny", PROMPT)
    assert (request.width, request.height) == (128, 128)
    assert (request.num_steps, request.guidance, request.num_images) == (4, 1.0, 1)
    assert request.references == ()
    assert request.encoding == Encoding("png")


async def test_answer_has_openais_fields_and_ours(client, handles):
    answer = await client.post(PATH, json={"prompt": PROMPT, "seed": 7, "n": 2, "user": "me"})
    body = answer.json()
    assert [base64.b64decode(p["b64_json"]) for p in body["data"]] == [b"image 7", b"image 8"]
    assert [p["seed"] for p in body["data"]] == [7, 8]
    assert (body["size"], body["output_format"], body["model"]) == ("128x128", "png", "tiny")
    assert body["id"] == handles.requests[0].request_id
    assert body["created"] > 1_700_000_000
    assert body["warnings"] == []
    assert body["usage"] == {
        "input_tokens": 48,
        "output_tokens": 128,
        "total_tokens": 176,
        "input_tokens_details": {"text_tokens": 48, "image_tokens": 0},
    }


async def test_headers_tell_seed_model_and_stages(client):
    answer = await client.post(PATH, json={"prompt": PROMPT, "seed": 7})
    assert answer.headers["x-flux-seed"] == "7"
    assert answer.headers["x-flux-model"] == "tiny"
    stages = [stage.split(";")[0] for stage in answer.headers["server-timing"].split(", ")]
    assert stages == ["queue", "encode", "denoise", "decode", "file", "total"]
    assert "denoise;dur=3.0" in answer.headers["server-timing"]


async def test_a_seed_is_generated_and_told(client, handles):
    answers = [await client.post(PATH, json={"prompt": PROMPT}) for _ in range(2)]
    seeds = [answer.json()["data"][0]["seed"] for answer in answers]
    assert seeds == [request.seed for request in handles.requests]
    assert seeds[0] != seeds[1]


async def test_requests_never_share_an_id(client, handles):
    for _ in range(2):
        await client.post(PATH, json={"prompt": PROMPT}, headers={"x-request-id": "same"})
    assert len({request.request_id for request in handles.requests}) == 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_inference_steps": 2}, {"num_steps": 2}),
        ({"steps": 3}, {"num_steps": 3}),
        ({"step": 3}, {"num_steps": 3}),
        ({"size": "auto"}, {"width": 128, "height": 128}),
        ({"size": "192x96"}, {"width": 192, "height": 96}),
        ({"width": 192, "height": 96}, {"width": 192, "height": 96}),
        ({"size": "192x96", "width": 192, "height": 96}, {"width": 192, "height": 96}),
        ({"model": "tiny"}, {"tier": "tiny"}),
        ({"seed": 2**64 - 2, "n": 2}, {"seed": 2**64 - 2}),
        ({"output_format": "webp"}, {"encoding": Encoding("webp")}),
        (
            {"output_format": "jpeg", "output_compression": 40},
            {"encoding": Encoding("jpeg", 40)},
        ),
        ({"prompt": '  {"scene": "a ring"} '}, {"prompt": '  {"scene": "a ring"} '}),
        ({"model": None, "n": None, "size": None, "seed": None}, {"num_images": 1}),
        ({"response_format": "b64_json", "background": "opaque"}, {}),
        ({"stream": False, "quality": "auto"}, {}),
        ({"mask": None, "url": None, "image": None, "anything": None}, {}),
        ({"stream": None, "steps": None, "guidance": None}, {"num_steps": 4}),
        ({"num_inference_steps": None, "step": 3}, {"num_steps": 3}),
        ({"num_inference_steps": 3, "steps": 3, "step": 3}, {"num_steps": 3}),
        ({"user": "me", "safety_identifier": "me"}, {}),
        ({"moderation": "auto", "enable_teacache": False}, {}),
        ({"partial_images": 0}, {"num_previews": 0}),
        ({"negative_prompt": ""}, {"negative_prompt": None}),
        ({"negative_prompt": " ", "true_cfg_scale": 1}, {"negative_prompt": None}),
        ({"true_cfg_scale": 0, "strength": 1}, {"true_cfg_scale": 1.0, "strength": 1.0}),
        ({"control_image": None, "image_prompt": ""}, {"references": ()}),
        ({"allow_truncation": True}, {"allow_truncation": True}),
        ({"allow_truncation": "false"}, {"allow_truncation": False}),
    ],
)
async def test_fields_reach_the_router(client, handles, fields, expected):
    answer = await client.post(PATH, json={"prompt": PROMPT} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["warnings"] == []
    assert {name: getattr(handles.requests[0], name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"guidance_scale": 3.5}, "guidance_scale has no effect on tiny"),
        ({"guidance": 1}, "guidance has no effect on tiny"),
        ({"guidance": 1, "guidance_scale": 1.0}, "guidance_scale has no effect on tiny"),
        ({"quality": "hd"}, "quality has no effect on tiny"),
        ({"output_compression": 50}, "output_compression has no effect on tiny"),
        ({"moderation": "low"}, "moderation has no effect on tiny"),
        ({"partial_images": 2}, "partial_images has no effect on tiny"),
        ({"style": "vivid"}, "style has no effect on tiny"),
        ({"input_fidelity": "high"}, "input_fidelity has no effect on tiny"),
        ({"generator_device": "cuda"}, "generator_device has no effect on tiny"),
        ({"max_sequence_length": 512}, "max_sequence_length has no effect on tiny"),
        ({"strength": 0.8}, "strength has no effect on tiny"),
        ({"denoising_strength": 0}, "denoising_strength has no effect on tiny"),
        ({"enable_teacache": True}, "enable_teacache has no effect on tiny"),
        ({"colour": "red"}, "unknown field 'colour' was ignored"),
    ],
)
async def test_what_is_not_heeded_is_named(client, handles, fields, warning):
    answer = await client.post(PATH, json={"prompt": PROMPT} | fields)
    assert answer.json()["warnings"] == [warning]
    assert handles.requests[0].guidance == 1.0


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": " \n\t"}, "prompt", "empty"),
        ({"prompt": "x" * 1001}, "prompt", "1000"),
        ({"prompt": 7}, "prompt", "string"),
        ({"prompt": None}, "prompt", "prompt is required"),
        ({"prompt": ["a", "b"]}, "prompt", "string"),
        ({"n": 0}, "n", "1"),
        ({"n": 5}, "n", "4"),
        ({"n": "two"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"n": 1.5}, "n", "integer"),
        ({"size": "8x128"}, "size", "16 to 4096"),
        ({"size": "4096x2048"}, "size", "4194304 pixels"),
        ({"size": "1024x128"}, "size", "4 times the other"),
        ({"width": 8, "height": 128}, "width", "16 to 4096"),
        ({"width": 128, "height": 8192}, "height", "16 to 4096"),
        ({"size": "100000x100000"}, "size", "WIDTHxHEIGHT"),
        ({"size": "0x0"}, "size", "WIDTHxHEIGHT"),
        ({"size": "-16x128"}, "size", "WIDTHxHEIGHT"),
        ({"size": "128 x 128"}, "size", "WIDTHxHEIGHT"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "\u0661\u0662\u0668x128"}, "size", "WIDTHxHEIGHT"),
        ({"width": 128}, "height", "together"),
        ({"height": 128}, "width", "together"),
        ({"size": "128x128", "width": 64, "height": 64}, "size", "disagree"),
        ({"seed": -2}, "seed", "0; leave it out, or send -1, for any"),
        ({"seed": 2**64}, "seed", str(2**64 - 1)),
        ({"seed": 2**64 - 1, "n": 2}, "seed", "n - 1"),
        ({"seed": 10**40}, "seed", str(2**64 - 1)),
        ({"num_inference_steps": 0}, "num_inference_steps", "1"),
        ({"steps": 0}, "steps", "1"),
        ({"num_inference_steps": 51}, "num_inference_steps", "50"),
        ({"steps": 51}, "steps", "steps must be 1 to 50"),
        ({"step": 51}, "step", "step must be 1 to 50"),
        ({"steps": 3, "num_inference_steps": 4}, "num_inference_steps", "disagree"),
        ({"steps": 3, "step": 4}, "steps", "disagree"),
        ({"guidance": 3, "guidance_scale": 4}, "guidance_scale", "disagree"),
        ({"guidance_scale": "high"}, "guidance_scale", "number"),
        ({"guidance": -1}, "guidance", "0"),
        ({"response_format": "url"}, "response_format", "keeps no images"),
        ({"response_format": "file"}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_format": "svg"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 101}, "output_compression", "100"),
        ({"output_compression": -1}, "output_compression", "0"),
        ({"background": "transparent"}, "background", "transparent"),
        ({"background": "red"}, "background", "'auto'"),
        ({"stream": "maybe"}, "stream", "boolean"),
        ({"stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3"),
        ({"partial_images": -1}, "partial_images", "greater than or equal to 0"),
        ({"mask": "..."}, "mask", "comes with the image"),
        ({"mask_image": "..."}, "mask_image", "comes with the image"),
    ],
)
async def test_bad_fields_are_named(client, handles, fields, param, words):
    answer = await client.post(PATH, json={"prompt": PROMPT} | fields)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert words in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert handles.requests == []


async def test_missing_prompt(client):
    answer = await client.post(PATH, json={"n": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "prompt is required"
    assert answer.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("model", ["flux-2-klein-4b", "dall-e-3", "x" * 10_000])
async def test_unknown_model(client, model):
    answer = await client.post(PATH, json={"prompt": PROMPT, "model": model})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "tiny" in error["message"]
    assert len(error["message"]) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"prompt"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "guidance": NaN}',
        b'{"prompt": "a", "guidance": Infinity}',
        b'{"prompt": "a", "guidance": 1e999}',
        b"[" * 100_000,
    ],
)
async def test_bodies_that_are_no_request(client, handles, body):
    answer = await client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.text) < 300
    assert handles.requests == []


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
async def test_wrong_content_type(client, content_type):
    answer = await client.post(PATH, content=b"{}", headers={"content-type": content_type})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_content_type"


async def test_content_type_may_name_a_charset(client):
    answer = await client.post(
        PATH,
        content=b'{"prompt": "a ring"}',
        headers={"content-type": "Application/JSON; charset=utf-8"},
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("fields", [("width", "height"), ("size", "size")])
def test_too_many_pixels_are_named_by_what_was_sent(fields):
    with pytest.raises(BadRequest, match="at most 4194304 pixels") as caught:
        check_size(4096, 1040, tier_for("flux-2-klein-4b"), fields)
    assert caught.value.field == fields[0]


@pytest.mark.parametrize(
    ("size", "wrong", "words"),
    [
        ((100, 128), 0, "multiples of 16"),
        ((128, 100), 1, "multiples of 16"),
        ((48, 128), 0, "64 to 4096"),
        ((128, 48), 1, "64 to 4096"),
        ((4112, 128), 0, "64 to 4096"),
        ((128, 4112), 1, "64 to 4096"),
    ],
)
def test_a_size_that_is_not_scaled_is_refused_by_the_side_that_is_wrong(size, wrong, words):
    with pytest.raises(BadRequest, match=words) as caught:
        check_size(*size, tier_for("flux-2-klein-4b"), ("width", "height"))
    assert caught.value.field == ("width", "height")[wrong]


async def test_the_replicas_warnings_come_after_ours(client, handles, monkeypatch):
    generate = handles.generate

    async def generate_and_warn(request, replica, on_event):
        return replace(await generate(request, replica), warnings=("the prompt was cut",))

    monkeypatch.setattr(handles, "generate", generate_and_warn)
    answer = await client.post(PATH, json={"prompt": PROMPT, "guidance": 2})
    assert answer.json()["warnings"] == ["guidance has no effect on tiny", "the prompt was cut"]


async def test_the_log_joins_the_clients_id_with_ours(client, handles, serve_log):
    await client.post(PATH, json={"prompt": PROMPT}, headers={"x-request-id": "mine"})
    [record] = serve_log.records
    image_id = handles.requests[0].request_id
    assert record.getMessage() == f"request mine: image request {image_id} on tiny for anybody"
    assert PROMPT not in serve_log.text
