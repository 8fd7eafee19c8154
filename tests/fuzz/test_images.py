"""Broken images: each becomes pixels or an error of ours, soon."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_ray.errors import FluxError
from flux_ray.gateway.images.decode import decode, decode_reference
from flux_ray.gateway.images.masks import decode_erased, decode_mask, decode_painted_mask
from flux_ray.gateway.images.normalize import orientation
from tests.conftest import LIMITS
from tests.fuzz.mutations import FUZZ, mended, mutated, within_budget
from tests.gateway.images.icc import ADOBE, GREY
from tests.gateway.images.image_files import endless_exif, exif, interlaced, noise, saved, scan_bomb
from tests.gateway.images.test_same_pixels_as_pillow import DEEP, FILES, MORE_FRAMES

# Pillow warns of odd metadata that it skips.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:PIL")]

RGBA = noise(channels=4)
KINDS = {
    "JPEG": [
        *(data for data in FILES.values() if data.startswith(b"\xff\xd8")),
        saved(noise(), "JPEG", icc_profile=ADOBE, progressive=True),
        saved(noise(channels=1), "JPEG", icc_profile=GREY),
        scan_bomb(40, 96, 80),
    ],
    "PNG": [
        *(data for data in FILES.values() if data.startswith(b"\x89PNG")),
        saved(RGBA, "PNG", icc_profile=ADOBE, exif=exif(5)),
        saved(noise().quantize(9), "PNG", transparency=b"\0\x80\xff"),
        interlaced(DEEP),
    ],
    "WEBP": [
        *(data for data in FILES.values() if data.startswith(b"RIFF")),
        saved(RGBA, "WEBP", icc_profile=ADOBE, exif=exif(7)),
        saved(RGBA, "WEBP", lossless=True, **MORE_FRAMES),
        saved(Image.new("RGBA", (90, 90)), "WEBP", exif=endless_exif(50)),
    ],
}
READERS = (
    decode,
    decode_mask,
    decode_painted_mask,
    decode_erased,
    lambda data, limits, name: decode_reference(data, limits, name, (10_000, 2**20)),
)


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(st.data())
def test_images(kind, data):
    file = data.draw(mutated(KINDS[kind]))
    if kind == "PNG" and data.draw(st.booleans()):
        file = mended(file)
    reader = data.draw(st.sampled_from(READERS))
    for _ in within_budget():
        try:
            reader(file, LIMITS, "image 1")
        except FluxError as error:
            assert error.status == 400
            assert error.message.startswith("image 1 ")


@FUZZ
@given(mutated([exif(6), exif(6).replace(b"II*", b"MM*"), b"Exif\0\0" + exif(3), endless_exif(9)]))
def test_orientations(data):
    for _ in within_budget():
        assert 1 <= orientation({"exif": data}) <= 8
        assert 1 <= orientation({"Raw profile type exif": f"\nexif\n1\n{data.hex()}"}) <= 8
        assert 1 <= orientation({"xmp": data}) <= 8
