"""`POST /v1/images/edits`: images as file parts, fields as text."""

import httpx
import pytest

from flux_ray.config.gateway import GatewayArgs, Limits
from flux_ray.gateway.api import build_api

PATH = "/v1/images/edits"
PROMPT = {"prompt": "make the circle green"}


async def test_one_image(client, handles, make_image):
    answer = await client.post(PATH, data=PROMPT, files={"image": ("in.png", make_image(96, 80))})
    assert answer.status_code == 200
    [request] = handles.requests
    [reference] = request.references
    assert (reference.width, reference.height) == (96, 80)
    assert reference.rgb == b"\xff\x00\x00" * 96 * 80
    assert (request.width, request.height) == (96, 80)
    assert answer.json()["usage"]["input_tokens_details"]["image_tokens"] == 6 * 5


@pytest.mark.parametrize("name", ["image", "image[]"])
async def test_several_images_in_order(client, handles, make_image, name):
    files = [(name, ("blob", make_image(color=color))) for color in ("red", "blue")]
    answer = await client.post(PATH, data=PROMPT, files=files)
    assert answer.status_code == 200
    assert [r.rgb[:3] for r in handles.requests[0].references] == [b"\xff\0\0", b"\0\0\xff"]


async def test_text_parts_are_parsed(client, handles, make_image):
    data = PROMPT | {
        "seed": "7",
        "n": "2",
        "size": "128x64",
        "steps": "3",
        "guidance": "2.5",
        "output_format": "jpeg",
        "stream": "false",
        "style": "vivid",
        "partial_images": "0",
        "colour": "red",
    }
    answer = await client.post(PATH, data=data, files={"image[]": ("blob", make_image())})
    assert answer.status_code == 200
    [request] = handles.requests
    assert (request.seed, request.num_images, request.num_steps) == (7, 2, 3)
    assert (request.width, request.height) == (128, 64)
    assert answer.json()["warnings"] == [
        "guidance has no effect on tiny",
        "style has no effect on tiny",
        "unknown field 'colour' was ignored",
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((96, 80), (96, 80)),
        ((100, 90), (96, 80)),
        ((512, 512), (192, 192)),
        ((300, 300), (192, 192)),
        ((800, 400), (192, 96)),
        ((512, 64), (192, 64)),
        ((64, 70), (64, 64)),
    ],
)
@pytest.mark.parametrize("asked", [{}, {"size": "auto"}])
async def test_size_follows_the_first_reference(client, handles, make_image, size, expected, asked):
    files = [("image[]", ("a", make_image(*size))), ("image[]", ("b", make_image()))]
    await client.post(PATH, data=PROMPT | asked, files=files)
    assert (handles.requests[0].width, handles.requests[0].height) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seed": "seven"}, "seed"),
        ({"strength": "0.5"}, "strength"),
        ({"n": "1.5"}, "n"),
        ({"n": "9"}, "n"),
        ({"guidance": "nan"}, "guidance"),
        ({"guidance": "inf"}, "guidance"),
        ({"stream": "maybe"}, "stream"),
        ({"prompt": "  "}, "prompt"),
        ({"size": "8x100"}, "size"),
        ({"mask": "data:..."}, "mask"),
        ({"url": "http://127.0.0.1/"}, "url"),
        ({"url[]": "http://127.0.0.1/"}, "url"),
        ({"seed": ["1", "2"]}, "seed"),
        ({"steps": "51"}, "steps"),
        ({"steps": "3", "step": "4"}, "steps"),
    ],
)
async def test_bad_text_parts_are_named(client, handles, make_image, fields, param):
    answer = await client.post(PATH, data=PROMPT | fields, files={"image": ("a", make_image())})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert handles.requests == []


async def test_a_file_where_text_belongs(client, make_image):
    files = {"image": ("a", make_image()), "prompt": ("p", b"a ring")}
    answer = await client.post(PATH, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


async def test_an_image_as_text(client):
    # A part without a filename is text.
    files = {"image": (None, "aGVsbG8=")}
    answer = await client.post(PATH, data=PROMPT, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_image"


async def test_no_image(client):
    files = {"prompt": (None, "make it red")}
    answer = await client.post(PATH, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "image is required"
    assert answer.json()["error"]["param"] == "image"


@pytest.mark.parametrize("num_images", [3, 40])
async def test_too_many_images(client, handles, make_image, num_images):
    files = [("image[]", ("a", make_image())) for _ in range(num_images)]
    answer = await client.post(PATH, data=PROMPT, files=files)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("image", "invalid_image")
    assert "at most" in error["message"]
    assert handles.requests == []


async def test_too_many_text_parts(client, make_image):
    data = PROMPT | {f"field{number}": "" for number in range(64)}
    answer = await client.post(PATH, data=data, files={"image": ("a", make_image())})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "a form may have at most 64 text parts"
    assert answer.json()["error"]["param"] is None


@pytest.mark.parametrize(
    ("name", "words"), [("prompt", "longer than 1000"), ("image", "not a PNG"), ("size", "auto")]
)
async def test_an_over_long_text_part_is_named(router, make_image, name, words):
    limits = Limits(max_prompt_chars=1000)
    api = build_api(router, GatewayArgs(tiers=("tiny",), limits=limits))
    transport = httpx.ASGITransport(app=api)
    files = {"prompt": (None, "a ring")} | {"image": ("a", make_image())}
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.post(PATH, files=files | {name: (None, "x" * 2_000_000)})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name)
    assert words in error["message"]
    assert len(answer.text) < 300


async def test_numbered_files_are_a_list(client, handles, make_image):
    files = [(f"image[{number}]", ("a", make_image(64, 64))) for number in range(2)]
    answer = await client.post(PATH, data=PROMPT, files=files)
    assert answer.status_code == 200, answer.text
    assert len(handles.requests[0].references) == 2


async def test_a_file_that_nobody_reads_is_named(client, make_image):
    files = {"image": ("a", make_image()), "markup": ("m", make_image())}
    error = (await client.post(PATH, data=PROMPT, files=files)).json()["error"]
    assert (error["message"], error["param"]) == (
        "markup is no image that is read here",
        "markup",
    )


@pytest.mark.parametrize(
    ("size", "image_tokens"),
    [
        ((64, 64), 4 * 4),
        ((100, 90), 6 * 5),
        ((192, 192), 12 * 12),
        # 192 * sqrt(300 / 100) = 332.6 and 110.9 on the short side.
        ((600, 200), 20 * 6),
        ((512, 512), 12 * 12),
        ((500, 67), 31 * 4),
        ((193, 192), 12 * 11),
        ((333, 777), 7 * 18),
    ],
)
async def test_references_are_counted_as_the_model_reads_them(
    client, make_image, size, image_tokens
):
    answer = await client.post(PATH, data=PROMPT, files={"image": ("a", make_image(*size))})
    assert answer.json()["usage"]["input_tokens_details"]["image_tokens"] == image_tokens


async def test_unknown_model(client, make_image):
    files = {"image": ("a", make_image())}
    answer = await client.post(PATH, data=PROMPT | {"model": "nope"}, files=files)
    assert answer.status_code == 404


async def test_the_bad_one_of_two_is_named(client, make_image):
    files = [("image[]", ("ok", make_image())), ("image[]", ("../../etc/passwd", b"no image"))]
    answer = await client.post(PATH, data=PROMPT, files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "image")
    assert error["message"] == "image 2 is not a PNG, JPEG or WebP image"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 400),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=x", 400),
    ],
)
async def test_bodies_that_are_no_form(client, content_type, status):
    answer = await client.post(PATH, content=b"{}", headers={"content-type": content_type})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
