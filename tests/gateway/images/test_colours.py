"""References have the colours that people see, and the caller is told of what could not be kept."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from flux_ray.errors import BadReference
from flux_ray.gateway.images.decode import decode
from flux_ray.gateway.images.masks import decode_mask
from flux_ray.gateway.images.normalize import with_notes
from tests.conftest import LIMITS
from tests.gateway.images.icc import ADOBE, GREY

BLUE = (40, 80, 220)
# What Adobe RGB's numbers of that blue are in sRGB.
SEEN = (0, 79, 225)
SIZE = (96, 80)


def file_of(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(mode: str, color: object) -> Image.Image:
    return Image.new(mode, SIZE, color)


def read(data: bytes):
    """Its first pixel, and what was noted."""
    raster, notes = with_notes(lambda: decode(data, LIMITS, "image 1"), "image 1")
    return tuple(raster.rgb[:3]), notes


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_a_wide_gamut_is_converted(format):
    options = {"lossless": True} if format == "WEBP" else {}
    options |= {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    seen, notes = read(file_of(plain("RGB", BLUE), format, icc_profile=ADOBE, **options))
    assert seen == pytest.approx(SEEN, abs=3)
    assert notes == []


def test_transparency_and_palettes_are_converted_too():
    for image in (plain("RGBA", (*BLUE, 255)), plain("RGB", BLUE).quantize(4)):
        seen, notes = read(file_of(image, icc_profile=ADOBE))
        assert seen == pytest.approx(SEEN, abs=3)
        assert notes == []


def test_grey_is_converted_by_its_own_curve():
    """Linear light: the middle number is far from the middle grey."""
    seen, notes = read(file_of(plain("L", 55), icc_profile=GREY))
    assert seen == pytest.approx((128, 128, 128), abs=4)
    assert notes == []


def test_deep_grey_is_converted_too():
    image = Image.fromarray(np.full(SIZE[::-1], 55 << 8, np.uint16))
    assert read(file_of(image, icc_profile=GREY))[0] == pytest.approx((128, 128, 128), abs=4)


def test_srgb_under_any_name_keeps_its_very_numbers():
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read(file_of(plain("RGB", BLUE), icc_profile=own)) == (BLUE, [])


@pytest.mark.parametrize(
    ("mode", "color", "profile", "expected"),
    [
        ("RGB", BLUE, b"no profile at all", BLUE),
        ("RGB", BLUE, ADOBE[:300], BLUE),
        ("RGB", BLUE, GREY, BLUE),
        ("L", 55, ADOBE, (55, 55, 55)),
        ("RGBA", (*BLUE, 255), bytes(500), BLUE),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_told(mode, color, profile, expected):
    seen, notes = read(file_of(plain(mode, color), icc_profile=profile))
    assert seen == expected
    assert notes == ["image 1: its colour profile cannot be used and was ignored"]


def test_cmyk_without_a_profile_is_read_as_before():
    data = file_of(plain("CMYK", (255, 255, 0, 0)), "JPEG", quality=100)
    assert read(data)[0] == pytest.approx((0, 0, 255), abs=3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_told_of(mode):
    hidden = plain("RGBA", (*BLUE, 0))
    image = plain("RGB", BLUE).quantize(4) if mode == "P" else hidden.convert(mode)
    options = {"transparency": image.getpixel((0, 0))} if mode == "P" else {}
    seen, notes = read(file_of(image, **options))
    assert seen == (255, 255, 255)
    assert notes == ["image 1: its transparent parts were put on white"]


def test_an_alpha_channel_that_hides_nothing_is_not_worth_a_word():
    assert read(file_of(plain("RGBA", (*BLUE, 255)))) == (BLUE, [])


def test_a_masks_own_transparency_is_what_it_is_for():
    data = file_of(plain("RGBA", (0, 0, 0, 0)))
    _, notes = with_notes(lambda: decode_mask(data, LIMITS, "mask"), "mask")
    assert notes == []


def noisy(**options: object) -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
    return file_of(Image.fromarray(pixels), "JPEG", **options)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_that_lacks_only_its_end_is_read_and_told(progressive, missing):
    data = noisy(progressive=progressive)
    whole, _ = with_notes(lambda: decode(data, LIMITS, "image 1"), "")
    cut, notes = with_notes(lambda: decode(data[:-missing], LIMITS, "image 1"), "image 1")
    assert cut == whole
    assert notes == ["image 1: the end of its file is missing, but none of its pixels"]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("left", [0.3, 0.6, 0.9, 0.99])
def test_a_jpeg_that_lacks_pixels_is_damaged(progressive, left):
    data = noisy(progressive=progressive)
    with pytest.raises(BadReference, match="image 1 is damaged"):
        decode(data[: int(len(data) * left)], LIMITS, "image 1")


def test_other_files_without_their_end_are_damaged():
    with pytest.raises(BadReference, match="damaged"):
        decode(file_of(plain("RGB", BLUE))[:-40], LIMITS, "image 1")


async def test_the_caller_is_told_on_every_dialect(client):
    image = base64.b64encode(file_of(plain("RGBA", (*BLUE, 0)))).decode()
    note = "image 1: its transparent parts were put on white"
    body = {"prompt": "a ring", "image": image}
    assert (await client.post("/v1/images/edits", json=body)).json()["warnings"] == [note]
    streamed = await client.post("/v1/images/edits", json=body | {"stream": True})
    assert note in streamed.text
    hub = {"inputs": image, "parameters": {"prompt": "a ring"}}
    answer = await client.post("/models/tiny", json=hub)
    assert note in answer.headers["x-flux-warnings"]


@pytest.mark.parametrize("name", ["mask", "mask_url"])
@pytest.mark.parametrize(
    ("mode", "color", "profile", "expected", "warnings"),
    [
        ("RGB", BLUE, ADOBE, SEEN, []),
        ("RGBA", (*BLUE, 255), ADOBE, SEEN, []),
        (
            "RGBA",
            (*BLUE, 0),
            None,
            (255, 255, 255),
            ["image 1: its transparent parts were put on white"],
        ),
    ],
)
async def test_under_a_mask_colours_are_the_same(
    client, handles, name, mode, color, profile, expected, warnings
):
    image, mask = plain(mode, color), plain("L", 255)
    body = {
        "prompt": "a ring",
        "image": base64.b64encode(file_of(image, icc_profile=profile)).decode(),
        name: base64.b64encode(file_of(mask)).decode(),
    }
    answer = await client.post("/v1/images/edits", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["warnings"] == warnings
    [request] = handles.requests
    assert request.mask is not None
    assert tuple(request.references[0].rgb[:3]) == pytest.approx(expected, abs=3)
