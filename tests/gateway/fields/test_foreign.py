"""What clients of other servers send: heeded where the meaning is clear, else refused by name."""

import base64
import json

import pytest

from flux_ray.catalog.tiers import TINY, tier_for
from flux_ray.config.gateway import GatewayArgs
from flux_ray.errors import BadRequest
from flux_ray.gateway.bfl.fields import parse_body
from flux_ray.gateway.bfl.request import size_for
from flux_ray.gateway.fields.foreign import (
    CONTROLS,
    DISTANCES,
    IMAGES,
    MASKS,
    OURS,
    REFUSED,
    is_control_name,
    is_image_name,
    is_mask_name,
    number_of,
)
from flux_ray.gateway.fields.sent import heed
from flux_ray.gateway.images.sources import RequestImages
from flux_ray.gateway.model_names import target_for
from flux_ray.gateway.openai.fields import ImageFields, warnings_for
from flux_ray.gateway.openai.references import sources_in_json
from flux_ray.gateway.openai.request import request_for
from tests.conftest import LIMITS

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
PROMPT = {"prompt": "make the circle green"}


@pytest.fixture
def red(make_image) -> str:
    return base64.b64encode(make_image(96, 80)).decode()


@pytest.fixture
def blue(make_image) -> str:
    return base64.b64encode(make_image(64, 64, color="blue")).decode()


@pytest.mark.parametrize("name", ["image_url", "input_image", "imageUrl", "init_image", "img"])
async def test_an_image_under_anothers_name_is_edited(client, handles, red, name):
    answer = await client.post(GENERATIONS, json=PROMPT | {name: red})
    assert answer.status_code == 200, answer.text
    assert [each.width for each in handles.requests[0].references] == [96]
    assert answer.json()["warnings"] == []


@pytest.mark.parametrize(
    ("names", "is_kind"),
    [(IMAGES, is_image_name), (MASKS, is_mask_name), (CONTROLS, is_control_name)],
)
def test_every_name_in_the_table_is_read(names, is_kind):
    """Also those that end in digits, which are not its place among others."""
    assert {name for name in names if not is_kind(name)} == set()
    assert all(number_of(name) == 1 for name in IMAGES)
    assert (is_image_name("image_b64_2"), number_of("image_b64_2")) == (True, 2)


@pytest.mark.parametrize("name", ["image_urls", "input_images", "reference_images", "files"])
async def test_a_list_under_anothers_name_is_edited(client, handles, red, blue, name):
    wrapped = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{blue}"}}
    answer = await client.post(GENERATIONS, json=PROMPT | {name: [red, wrapped]})
    assert answer.status_code == 200, answer.text
    assert [each.width for each in handles.requests[0].references] == [96, 64]


@pytest.mark.parametrize(
    ("first", "second"),
    [("image", "image2"), ("image", "image_2"), ("image_1", "image_2"), ("image1", "image2")],
)
async def test_numbered_images_come_by_their_numbers(client, handles, red, blue, first, second):
    answer = await client.post(GENERATIONS, json=PROMPT | {second: blue, first: red})
    assert answer.status_code == 200, answer.text
    assert [each.width for each in handles.requests[0].references] == [96, 64]


async def test_numbered_files_of_a_form_come_by_their_numbers(client, handles, make_image):
    files = {"image2": ("b", make_image(64, 64)), "image": ("a", make_image(96, 80))}
    assert (await client.post(EDITS, data=PROMPT, files=files)).status_code == 200
    assert [each.width for each in handles.requests[0].references] == [96, 64]


async def test_fields_in_extra_body_are_as_if_beside_it(client, handles, red):
    body = PROMPT | {"extra_body": {"image": red, "seed": 7}}
    answer = await client.post(GENERATIONS, json=body)
    assert (answer.status_code, answer.json()["warnings"]) == (200, [])
    assert (handles.requests[0].seed, len(handles.requests[0].references)) == (7, 1)
    answer = await client.post(GENERATIONS, json=body | {"seed": 8})
    assert "seed and extra_body.seed disagree" in answer.json()["error"]["message"]
    for wrong in ([1], "{", "[]", "7", '{"n": 1e}'):
        answer = await client.post(GENERATIONS, json=PROMPT | {"extra_body": wrong})
        assert answer.json()["error"]["param"] == "extra_body"
        assert "must be an object of further fields" in answer.json()["error"]["message"]


async def test_a_mask_under_anothers_name_is_heeded(client, handles, make_image):
    whole = base64.b64encode(make_image(96, 80)).decode()
    mask = base64.b64encode(make_image(96, 80, color="white")).decode()
    body = PROMPT | {"image_url": whole, "mask_url": mask}
    assert (await client.post(GENERATIONS, json=body)).status_code == 200
    assert set(handles.requests[0].mask.marks) == {255}
    other = base64.b64encode(make_image(80, 80, color="white")).decode()
    error = (await client.post(GENERATIONS, json=body | {"mask_url": other})).json()["error"]
    assert error["param"] == "mask_url"
    assert error["message"] == "mask_url is 80x80 but must match the image, 96x80"


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"aspect_ratio": "16:9"}, (160, 96)),
        ({"aspectRatio": "9:16"}, (96, 160)),
        ({"image_size": "landscape_16_9"}, (160, 96)),
        ({"image_size": "square_hd"}, (128, 128)),
        ({"image_size": "portrait_4_3"}, (96, 144)),
        ({"image_size": {"width": 96, "height": 64}}, (96, 64)),
        ({"image_size": "96x64"}, (96, 64)),
        ({"size": "96x64", "aspect_ratio": "1:1"}, (96, 64)),
        ({"image_width": 96, "image_height": 64}, (96, 64)),
        ({"aspect_ratio": "match_input_image"}, (128, 128)),
        ({"resolution": "96x64"}, (96, 64)),
        ({"megapixels": "0.01"}, (96, 96)),
    ],
)
async def test_shapes_under_others_names_are_heeded(client, handles, fields, size):
    answer = await client.post(GENERATIONS, json=PROMPT | fields)
    assert (answer.status_code, answer.json().get("warnings")) == (200, []), answer.text
    assert (handles.requests[0].width, handles.requests[0].height) == size
    if "size" not in fields:
        answer = await client.post("/models/tiny", json={"inputs": "a ring", "parameters": fields})
        assert answer.status_code == 200, answer.text
        assert (handles.requests[1].width, handles.requests[1].height) == size


async def test_a_ratio_in_a_form_is_heeded(client, handles, make_image):
    files = {"image": ("a", make_image(96, 80))}
    answer = await client.post(EDITS, data=PROMPT | {"aspect_ratio": "16:9"}, files=files)
    assert (answer.status_code, answer.json()["warnings"]) == (200, [])
    assert (handles.requests[0].width, handles.requests[0].height) == (160, 96)


async def test_what_is_finer_than_the_tier_generates_is_said(client, handles):
    sent = PROMPT | {"resolution": "4K"}
    fields, tier = ImageFields.read(sent), tier_for("flux-2-klein-4b")
    [warning] = warnings_for(fields, request_for(fields, tier, LIMITS, RequestImages()))
    assert "resolution is more than flux-2-klein-4b draws" in warning
    answer = await client.post(GENERATIONS, json=PROMPT | {"resolution": "2K"})
    [request] = handles.requests
    assert (request.width, request.height, request.output_size) == (128, 128, (2048, 2048))
    assert "tiny generates 128x128 best" in answer.json()["warnings"][0]


@pytest.mark.parametrize(
    "name", ["num_images", "num_outputs", "num_images_per_prompt", "numImages"]
)
async def test_a_number_of_images_is_heeded_or_refused(client, handles, name):
    answer = await client.post(GENERATIONS, json=PROMPT | {name: 3})
    assert [len(answer.json()["data"]), handles.requests[0].num_images] == [3, 3]
    for number, status in ((1, 200), (2, 400)):
        body = {"inputs": "a ring", "parameters": {name: number}}
        answer = await client.post("/models/tiny", json=body)
        assert answer.status_code == status
    assert name in answer.json()["error"]
    answer = await client.post(GENERATIONS, json=PROMPT | {name: 3, "n": 1})
    assert answer.json()["error"]["message"] == f"n and {name} disagree"
    answer = await client.post(GENERATIONS, json=PROMPT | {name: 99})
    assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize(
    "fields",
    [
        {"control_image": "aGk="},
        {"canny_image": "aGk="},
        {"controlnet": "x"},
        {"loras": [{"path": "x"}]},
        {"picture": "https://a.test/b.png"},
        {"anything": "data:image/png;base64,aGk="},
        {"photo": [{"src": "https://a.test/b.png"}]},
        {"tiling": True},
        {"upscale_factor": 2},
        {"orientation": "landscape"},
        {"aspect_ratio": "wide"},
        {"resolution": "fine"},
        {"image_size": "large"},
        {"mask_prompt": "the circle"},
        {"provider_options": {"image": "x"}},
    ],
)
async def test_what_is_not_clear_or_not_served_is_refused_by_name(client, handles, fields):
    [name] = fields
    answer = await client.post(GENERATIONS, json=PROMPT | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name), answer.text
    assert name in error["message"]
    answer = await client.post("/models/tiny", json={"inputs": "a ring", "parameters": fields})
    assert (answer.status_code, name in answer.json()["error"]) == (400, True), answer.text
    with pytest.raises(BadRequest) as caught:
        check_as_bfl(fields)
    assert caught.value.field == name
    assert handles.requests == []


def check_as_bfl(fields) -> None:
    """All of BFL's checks, of which some are made when the tier is known."""
    sent = parse_body(body_of(fields))
    sources_in_json(sent.others, target_for("tiny", GatewayArgs(tiers=("tiny",))))
    size_for(sent, TINY, ())


def body_of(fields) -> bytes:
    return json.dumps(PROMPT | fields).encode()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_refused_name_is_refused_unless_it_asks_for_nothing(name):
    with pytest.raises(BadRequest, match=f"^{name}: ") as caught:
        ImageFields.read(PROMPT | {name: "something"})
    assert caught.value.field == name
    for nothing in (None, "", False, 0, [], {}, "none"):
        ImageFields.read(PROMPT | {name: nothing})


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_a_distance_is_refused_where_there_is_an_image_to_be_near_to(name):
    ImageFields.read(PROMPT | {name: 0.5})
    ImageFields.read(PROMPT | {name: 1.0, "image": "x"})
    with pytest.raises(BadRequest, match=f"^{name}: "):
        ImageFields.read(PROMPT | {name: 0.5, "image": "x"})


def test_no_name_means_two_things():
    tables = [set(OURS), set(IMAGES), set(MASKS), set(CONTROLS), set(REFUSED), set(DISTANCES)]
    assert len(set().union(*tables)) == sum(map(len, tables))


@pytest.mark.parametrize("name", ["seed", "n", "width", "num_inference_steps", "guidance_scale"])
@pytest.mark.parametrize("value", [64, 64.0, "64", "64.0", " 64 "])
def test_a_number_is_the_same_however_it_is_written(name, value):
    sent = {name: value} | ({"height": 64} if name == "width" else {})
    assert getattr(ImageFields.read(PROMPT | sent), name) == 64


@pytest.mark.parametrize("value", [True, False, 7.5, "seven", [7], {"seed": 7}])
def test_what_is_no_whole_number_is_no_seed_on_any_route(value):
    for read in (
        lambda: ImageFields.read(PROMPT | {"seed": value}),
        lambda: parse_body(body_of({"seed": value})),
    ):
        with pytest.raises(BadRequest) as caught:
            read()
        assert caught.value.field == "seed"


async def test_a_seed_without_room_for_all_images_is_named_as_it_was_sent(client):
    sent = {"random_seed": 2**64 - 1, "num_images": 2}
    error = (await client.post(GENERATIONS, json=PROMPT | sent)).json()["error"]
    assert error["param"] == "random_seed"
    assert error["message"].startswith("random_seed + num_images - 1 must be at most")


@pytest.mark.parametrize(
    ("sent", "sides"),
    [
        ({"size": "96x64", "width": 64, "height": 64}, None),
        ({"size": "96x64", "width": 64}, None),
        ({"size": "96x64", "width": "96"}, (96, 64)),
        ({"size": "96x64", "width": 0, "height": None}, (96, 64)),
        ({"size": "96x64", "width": 96, "height": 64.0}, (96, 64)),
    ],
)
def test_a_job_has_one_size(sent, sides):
    if sides is not None:
        fields = parse_body(body_of(sent))
        assert (fields.width, fields.height) == sides
        return
    with pytest.raises(BadRequest, match="width and size disagree"):
        parse_body(body_of(sent))


@pytest.mark.parametrize("image", [[], [""], [[], " "]])
def test_an_empty_list_is_no_image_to_fill(image):
    assert parse_body(body_of({"image": image})).image is None
    with pytest.raises(BadRequest, match="prompt is empty"):
        parse_body(body_of({"image": image, "prompt": ""}))


@pytest.mark.parametrize("value", [-1, -1.0, "-1", None, "", " "])
def test_a_seed_of_minus_one_is_none(value):
    assert ImageFields.read(PROMPT | {"seed": value}).seed is None
    assert parse_body(body_of({"seed": value})).seed is None


@pytest.mark.parametrize("value", ["jpg", "JPG", "jpeg", "image/jpg", "image/jpeg", ".jpg"])
def test_jpg_is_jpeg(value):
    assert ImageFields.read(PROMPT | {"output_format": value}).output_format == "jpeg"
    assert parse_body(body_of({"format": value})).output_format == "jpeg"


@pytest.mark.parametrize("empty", [None, "", "  "])
@pytest.mark.parametrize("name", sorted(ImageFields.model_fields.keys() - {"prompt"}))
def test_empty_is_absent(name, empty):
    assert heed(PROMPT | {name: empty}).values in (PROMPT, PROMPT | {"negative_prompt": empty})


async def test_empty_fields_change_nothing_on_any_route(client, handles):
    empty = {"model": "", "size": "", "seed": "", "response_format": "", "n": "", "image": [""]}
    empty |= {"output_format": "", "num_inference_steps": "", "user": "", "mask": ""}
    answer = await client.post(GENERATIONS, json=PROMPT | empty)
    assert (answer.status_code, answer.json()["warnings"]) == (200, []), answer.text
    del empty["model"]
    answer = await client.post("/models/tiny", json={"inputs": "a ring", "parameters": empty})
    assert answer.status_code == 200, answer.text
    parse_body(body_of(empty))
