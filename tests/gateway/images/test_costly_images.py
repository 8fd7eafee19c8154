"""Images that ask for minutes of work in a few bytes: refused at once, or stopped soon."""

import base64
import io
import time

import pytest
from PIL import Image

from flux_ray.config.gateway import Limits
from flux_ray.errors import BadReference
from flux_ray.gateway.images import file_formats
from flux_ray.gateway.images.decode import decode, is_large, work_bytes
from flux_ray.gateway.images.normalize import with_notes
from tests.gateway.images.icc import ADOBE
from tests.gateway.images.image_files import (
    after_start,
    before,
    chunk,
    endless_exif,
    exif,
    noise,
    saved,
    scan_bomb,
    segment,
    webp_of_frames,
    with_scans,
)

LIMITS = Limits()
PLAIN = "image 1 takes too long to decode: save it as a plain \\(baseline\\) JPEG or PNG"
JPEG, PROGRESSIVE = (saved(noise(), "JPEG", progressive=each) for each in (False, True))
PNG = saved(noise(), "PNG")
# An eighth of what is allowed: on a slow machine the rest of this test's time.
NUM_BYTES = LIMITS.max_image_bytes // 8
MAX_S = 1.0


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def seconds_of(data: bytes, limits: Limits = LIMITS) -> float:
    """Of the processor, to read it or to refuse it in our own words."""
    started_s = time.thread_time()
    try:
        decode(data, limits, "image 1")
    except BadReference as error:
        assert str(error).startswith("image 1 ")
    return time.thread_time() - started_s


@pytest.mark.parametrize(
    "data",
    [
        scan_bomb(1500),
        scan_bomb(1500)[:-2],
        scan_bomb(101, 64, 64),
        after_start(JPEG, segment(0xFE) * 3000),
        after_start(JPEG, segment(0xDB, b"\0" + b"\1" * 64) * 3000),
        JPEG.replace(b"\xff\xc0", b"\xff\xc9"),
        before(b"IDAT", PNG, chunk(b"IDAT") * 30_000),
        before(b"IDAT", PNG, chunk(b"abCd") * 30_000),
        before(b"IEND", PNG, chunk(b"tEXt", b"a\0b") * 30_000),
    ],
    ids=[
        "scans",
        "scans without an end",
        "scans of a small image",
        "comments",
        "tables",
        "arithmetic coding",
        "empty data",
        "empty chunks",
        "texts",
    ],
)
def test_what_no_encoder_writes_is_refused_with_a_remedy(data):
    started_s = time.thread_time()
    with pytest.raises(BadReference, match=PLAIN):
        decode(data, LIMITS, "image 1")
    assert time.thread_time() - started_s < MAX_S


def test_the_larger_the_image_the_fewer_its_scans():
    limits = Limits(max_image_pixels=500_000)
    assert seconds_of(scan_bomb(32), limits) < MAX_S
    decode(with_scans(PROGRESSIVE, 80), limits, "image 1")
    with pytest.raises(BadReference, match=PLAIN):
        decode(scan_bomb(33), limits, "image 1")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "data",
    [
        after_start(JPEG, bytes(NUM_BYTES)),
        after_start(JPEG, b"\xff" * NUM_BYTES),
        after_start(JPEG, b"\xff\0" * (NUM_BYTES // 2)),
        after_start(JPEG, b"\xff\xd0" * (NUM_BYTES // 2)),
        after_start(JPEG, segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4" + bytes(6)) * 1000),
        after_start(JPEG, segment(0xE1, b"Exif\0\0" + endless_exif(5000))),
        JPEG[:-2] + b"\xff\xd0" * (NUM_BYTES // 2) + JPEG[-2:],
        before(b"IDAT", PNG, chunk(b"eXIf", endless_exif())),
        before(
            b"IDAT", PNG, chunk(b"tEXt", b"Raw profile type exif\0" + b"\n0" * (NUM_BYTES // 2))
        ),
        before(b"IDAT", PNG, chunk(b"tEXt", b"XML:com.adobe.xmp\0" + b"tiff:Orientation=" * 9**5)),
        before(b"IDAT", PNG, chunk(b"acTL", b"\x7f\xff\xff\xff" + bytes(4))),
        webp_of_frames(NUM_BYTES // 60),
        saved(noise(), "WEBP", exif=endless_exif()),
    ],
    ids=[
        "zeros",
        "fillers",
        "escaped fillers",
        "restarts",
        "photoshop",
        "exif of a jpeg",
        "restarts in data",
        "exif of a png",
        "exif in hexadecimals",
        "xmp",
        "frames that are not there",
        "frames",
        "exif of a webp",
    ],
)
def test_what_has_no_pixels_takes_no_time(data):
    assert seconds_of(data) < MAX_S


def test_decoding_stops_at_the_limit():
    data = saved(noise(1500, 1000), "JPEG", quality=95, progressive=True)
    decode(data, LIMITS, "image 1")
    with pytest.raises(BadReference, match=PLAIN) as caught:
        decode(data, Limits(max_decode_s=0.001), "image 1")
    assert caught.value.field == "image"


def test_the_limit_is_of_all_attempts_together(monkeypatch):
    """A file without its end is decoded three times."""
    ticks = 0

    def count() -> float:
        nonlocal ticks
        ticks += 1
        return float(ticks)

    monkeypatch.setattr(file_formats.time, "thread_time", count)
    decode(PROGRESSIVE, LIMITS.model_copy(update={"max_decode_s": 1e9}), "image 1")
    limits = LIMITS.model_copy(update={"max_decode_s": ticks * 1.5})
    decode(PROGRESSIVE, limits, "image 1")
    with pytest.raises(BadReference, match=PLAIN):
        decode(PROGRESSIVE[:-2], limits, "image 1")


@pytest.mark.parametrize("profile", [ADOBE.replace(b"XYZ ", b"mpet", 1), ADOBE + bytes(5 * 2**20)])
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_a_profile_that_may_take_minutes_is_ignored_and_told(profile, format):
    image = noise()
    seen, notes = with_notes(
        lambda: decode(saved(image, format, icc_profile=profile), LIMITS, "image 1"), "image 1"
    )
    assert seen == decode(saved(image, format), LIMITS, "image 1")
    assert notes == ["image 1: its colour profile cannot be used and was ignored"]


@pytest.mark.parametrize(("side", "codes"), [(200, 344 * 200**2), (1200, 360 * 10**6)])
def test_the_codes_of_a_lossless_webp_are_counted(side, codes):
    """A megapixel may have 340 megabytes of them, in a file of 280 kilobytes."""
    data = saved(Image.new("RGB", (side, side)), "WEBP", lossless=True)
    plain = saved(Image.new("RGB", (side, side)), "WEBP")
    more = work_bytes(opened(data), data) - work_bytes(opened(plain), plain)
    assert more == pytest.approx(codes, rel=0.01)


async def test_the_caller_is_told_which_field(client):
    image = base64.b64encode(scan_bomb(200)).decode()
    answer = await client.post("/v1/images/edits", json={"prompt": "a ring", "image": image})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "image"
    assert error["message"].startswith("image 1 takes too long to decode: save it as a plain")


def test_a_field_that_says_no_way_up_is_passed_over():
    for orientation in (0, 9, 65_535):
        data = saved(noise(), "PNG", exif=exif(orientation))
        assert decode(data, LIMITS, "image 1").rgb == noise().tobytes()


@pytest.mark.parametrize(
    ("data", "is_so"),
    [
        (JPEG, False),
        (PNG, False),
        (saved(Image.new("RGB", (2048, 2048)), "JPEG", icc_profile=ADOBE), False),
        (saved(Image.new("RGB", (2600, 2600)), "JPEG"), True),
        (saved(Image.new("RGB", (1024, 1024)), "WEBP", lossless=True), True),
    ],
    ids=["JPEG", "PNG", "four megapixels", "six", "codes of a lossless WebP"],
)
def test_images_that_take_long_are_known_by_their_heads(data, is_so):
    started_s = time.thread_time()
    assert is_large(data, LIMITS, "image 1") is is_so
    assert time.thread_time() - started_s < MAX_S / 10
