"""Masks: how they are sent, what they mark, and who never gets one."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flux_ray.catalog.tiers import tier_for
from flux_ray.config.gateway import Alias, Limits
from flux_ray.errors import BadReference, BadRequest
from flux_ray.gateway.images.decode import whole_image
from flux_ray.gateway.images.masks import decode_mask, mask_from_alpha, mask_from_luma
from flux_ray.gateway.images.sources import RequestImages
from flux_ray.gateway.model_names import ResolvedModel, requests_for
from flux_ray.gateway.openai.fields import ImageFields
from flux_ray.gateway.openai.request import request_for
from flux_ray.request import Mask, RgbImage

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
PROMPT = {"prompt": "make the circle green"}
LIMITS = Limits()
SIZE = (96, 80)
# What the masks below mark: the left half.
LEFT = np.zeros(SIZE[::-1], np.uint8)
LEFT[:, :48] = 255


def file_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_alpha(alpha: np.ndarray, color: str = "red") -> Image.Image:
    image = Image.new("RGB", alpha.shape[::-1], color)
    image.putalpha(Image.fromarray(alpha))
    return image


# OpenAI's way: what is to be edited is transparent.
ERASED = file_of(with_alpha(255 - LEFT))
# Everybody else's: it is white.
PAINTED = file_of(Image.fromarray(LEFT))


def indexed() -> bytes:
    """Two colours, of which the one of the left half is transparent."""
    image = Image.fromarray((LEFT == 0).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 9, 9, 9])
    return file_of(image, transparency=0)


def canvas() -> bytes:
    """As a browser saves black and white: opaque, with an alpha channel."""
    image = Image.fromarray(LEFT).convert("RGBA")
    return file_of(image)


MASKS = {
    "erased": ERASED,
    "erased in webp": file_of(with_alpha(255 - LEFT), "WEBP", lossless=True, exact=True),
    "erased palette": indexed(),
    "painted": PAINTED,
    "painted in rgb": file_of(Image.fromarray(LEFT).convert("RGB")),
    "painted in jpeg": file_of(Image.fromarray(LEFT), "JPEG", quality=95),
    "painted in one bit": file_of(Image.fromarray(LEFT).convert("1")),
    "painted in 16 bits": file_of(Image.fromarray(LEFT.astype(np.uint16) * 257)),
    "canvas": canvas(),
}


@pytest.mark.parametrize("name", MASKS)
def test_what_is_to_be_generated_is_marked(name):
    assert decode_mask(MASKS[name], LIMITS, "mask") == Mask(*SIZE, LEFT.tobytes())


def test_edges_are_where_openai_and_diffusers_have_them():
    """Fully transparent only; and lighter than half."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    by_alpha = mask_from_alpha(with_alpha(ramp))
    by_luma = mask_from_luma(Image.fromarray(ramp))
    rows = [np.frombuffer(mask.marks, np.uint8).reshape(64, 256)[0] for mask in (by_alpha, by_luma)]
    assert rows[0].tolist() == [255] + [0] * 255
    assert rows[1].tolist() == [0] * 128 + [255] * 128


def test_a_mask_is_upright_as_its_image_is():
    image = Image.fromarray(LEFT)
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = decode_mask(file_of(image, exif=exif), LIMITS, "mask")
    turned = np.rot90(LEFT, -1)
    assert mask == Mask(80, 96, turned.tobytes())


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", SIZE, "black"),
        Image.new("RGB", SIZE, (100, 100, 100)),
        Image.new("RGBA", SIZE, (0, 0, 0, 255)),
        Image.new("RGBA", SIZE, (255, 255, 255, 1)),
    ],
)
def test_a_mask_that_marks_nothing_is_a_mistake(image):
    """Most likely it is the other way round, or lost its transparency."""
    with pytest.raises(BadReference, match="mask marks nothing to draw"):
        decode_mask(file_of(image), LIMITS, "mask")


def in_json(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("name", ["mask", "mask_image", "mask[]"])
@pytest.mark.parametrize("mask", [ERASED, PAINTED], ids=["erased", "painted"])
async def test_a_mask_as_a_file(client, handles, make_image, name, mask):
    files = {"image": ("in.png", make_image(*SIZE)), name: ("mask.png", mask)}
    answer = await client.post(EDITS, data=PROMPT, files=files)
    assert answer.status_code == 200, answer.text
    assert handles.requests[0].mask == Mask(*SIZE, LEFT.tobytes())
    assert len(handles.requests[0].references) == 1
    assert "warnings" not in answer.json() or answer.json()["warnings"] == []


@pytest.mark.parametrize("name", ["mask", "mask_image"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: text,
        lambda text: f"data:image/png;base64,{text}",
        lambda text: {"image_url": f"data:image/png;base64,{text}"},
        lambda text: {"image_url": {"url": f"data:image/png;base64,{text}"}},
        lambda text: [text],
    ],
)
@pytest.mark.parametrize("path", [EDITS, GENERATIONS])
async def test_a_mask_as_text(client, handles, make_image, name, wrap, path):
    body = PROMPT | {"image": in_json(make_image(*SIZE)), name: wrap(in_json(ERASED))}
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert handles.requests[0].mask == Mask(*SIZE, LEFT.tobytes())


async def test_a_mask_as_a_text_part(client, handles, make_image):
    files = {"image": ("in.png", make_image(*SIZE)), "mask": (None, in_json(PAINTED))}
    assert (await client.post(EDITS, data=PROMPT, files=files)).status_code == 200
    assert handles.requests[0].mask == Mask(*SIZE, LEFT.tobytes())


async def test_the_image_that_is_edited_is_counted_at_the_size_that_is_generated(
    client, make_image
):
    files = {"image": ("a", make_image(*SIZE)), "mask": ("m", ERASED)}
    answer = await client.post(EDITS, data=PROMPT | {"size": "192x160"}, files=files)
    assert answer.json()["usage"]["input_tokens_details"]["image_tokens"] == 12 * 10


async def test_a_mask_is_of_the_first_of_two_images(client, handles, make_image):
    files = [
        ("image[]", ("a", make_image(*SIZE))),
        ("image[]", ("b", make_image(64, 64))),
        ("mask", ("m", ERASED)),
    ]
    assert (await client.post(EDITS, data=PROMPT, files=files)).status_code == 200
    [request] = handles.requests
    assert [(each.width, each.height) for each in request.references] == [SIZE, (64, 64)]
    assert (request.width, request.height) == SIZE
    answer = await client.post(EDITS, data=PROMPT, files=[files[1], files[0], files[2]])
    assert answer.json()["error"]["message"] == "mask is 96x80 but must match the image, 64x64"


@pytest.mark.parametrize("nothing", [None, "", []])
async def test_no_mask(client, handles, make_image, nothing):
    body = PROMPT | {"image": in_json(make_image(*SIZE)), "mask": nothing}
    assert (await client.post(EDITS, json=body)).status_code == 200
    assert handles.requests[0].mask is None


async def test_transparency_of_the_image_is_no_mask(client, handles):
    """As OpenAI's older model had it: here it has always been drawn over white."""
    assert (await client.post(EDITS, data=PROMPT, files={"image": ("a", ERASED)})).is_success
    assert handles.requests[0].mask is None


MISTAKES = {
    "another size": ({"mask": in_json(file_of(Image.new("L", (80, 96), "white")))}, "mask"),
    "no image": ({"mask": in_json(b"hello")}, "mask"),
    "no base64": ({"mask_image": "!!!!"}, "mask_image"),
    "a file id": ({"mask": {"file_id": "file-123"}}, "mask"),
    "two": ({"mask": [in_json(ERASED), in_json(ERASED)]}, "mask"),
    "two names": ({"mask_image": in_json(ERASED), "mask": in_json(ERASED)}, "mask"),
    "nothing marked": ({"mask": in_json(file_of(Image.new("L", SIZE)))}, "mask"),
}


@pytest.mark.parametrize(("fields", "param"), MISTAKES.values(), ids=MISTAKES)
async def test_mistakes_are_named(client, handles, make_image, fields, param):
    body = PROMPT | {"image": in_json(make_image(*SIZE))} | fields
    answer = await client.post(EDITS, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in (param, *fields)
    assert handles.requests == []


@pytest.mark.parametrize("path", [EDITS, GENERATIONS])
async def test_a_mask_without_an_image(client, handles, path):
    answer = await client.post(path, json=PROMPT | {"mask": in_json(ERASED)})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "mask")
    assert error["message"] == "a mask comes with the image that it is of"
    assert handles.requests == []


FIELDS = ImageFields(prompt="a ring", seed=1)
KLEIN, UNABLE = tier_for("flux-2-klein-4b"), replace(tier_for("flux-2-dev"), takes_mask=False)
IMAGE = whole_image(RgbImage(*SIZE, bytes(96 * 80 * 3)), [KLEIN.max_reference_pixels])
MASK = Mask(*SIZE, LEFT.tobytes())


def build(tier, references=(IMAGE,)):
    return request_for(FIELDS, tier, LIMITS, RequestImages(references, MASK))


def test_a_tier_that_takes_no_masks_says_so():
    with pytest.raises(BadRequest, match="flux-2-dev takes no masks") as caught:
        build(UNABLE)
    assert caught.value.field == "mask"
    with pytest.raises(BadRequest, match="comes with the image") as caught:
        build(KLEIN, references=())
    assert caught.value.field == "mask"


def test_a_size_that_the_model_would_refuse_of_a_reference():
    """Cut to whole tokens, 1040 x 130 is more than eight times as long as wide."""
    image = whole_image(RgbImage(1040, 130, b""), [KLEIN.max_reference_pixels])
    mask = Mask(1040, 130, b"")
    with pytest.raises(BadRequest, match="1040x128 is too long") as caught:
        request_for(FIELDS, KLEIN, LIMITS, RequestImages((image,), mask))
    assert caught.value.field == "size"
    asked = ImageFields.read({"prompt": "a ring", "image_width": 1040, "h": 128})
    with pytest.raises(BadRequest, match="1040x128 is too long") as caught:
        request_for(asked, KLEIN, LIMITS, RequestImages((image,), mask))
    assert caught.value.field == "image_width"
    asked = FIELDS.model_copy(update={"size": "1024x128"})
    assert request_for(asked, KLEIN, LIMITS, RequestImages((image,), mask)).width == 1024
    assert request_for(FIELDS, KLEIN, LIMITS, RequestImages((image,))).width == 1040


def test_an_alias_goes_on_to_a_tier_that_takes_them():
    alias = Alias(tiers=("flux-2-dev", "flux-2-klein-4b"))
    [request] = requests_for(ResolvedModel("best", alias, (UNABLE, KLEIN)), build)
    assert (request.tier, request.mask) == ("flux-2-klein-4b", MASK)
    with pytest.raises(BadRequest, match="takes no masks"):
        requests_for(ResolvedModel("best", alias, (UNABLE,)), build)


async def test_models_say_whether_they_take_masks(client):
    [model] = (await client.get("/v1/models")).json()["data"]
    assert model["takes_mask"] is True
