"""Good images of every kind have the pixels that Pillow alone gives them, metadata or none."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from flux_ray.config.gateway import Limits
from flux_ray.gateway.images.decode import decode
from flux_ray.gateway.images.file_formats import PIECE_BYTES, DecodeWork, plain_jpeg
from flux_ray.gateway.images.normalize import with_notes
from tests.gateway.images.image_files import (
    after_start,
    before,
    chunk,
    exif,
    interlaced,
    noise,
    saved,
    segment,
)

LIMITS = Limits()
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
JPEG, PROGRESSIVE = (saved(noise(), "JPEG", progressive=each) for each in (False, True))
PNG = saved(noise(), "PNG")
GREY, CMYK = noise(channels=1), noise(channels=4).convert("RGB").convert("CMYK")
DEEP = np.random.default_rng(1).integers(0, 2**16, (83, 97, 3), np.uint16)
MORE_FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (97, 83), "red")]}


def frames_of_png(data: bytes) -> bytes:
    """The PNG as the first frame of an animation."""
    control = struct.pack(">IIIIIHHBB", 0, 97, 83, 0, 0, 1, 10, 0, 0)
    return before(b"IDAT", data, chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", control))


FILES = {
    "baseline": JPEG,
    "progressive": PROGRESSIVE,
    "no subsampling": saved(noise(), "JPEG", progressive=True, subsampling=0, quality=97),
    "restart markers": saved(noise(), "JPEG", restart_marker_blocks=1),
    "restarts of progressive": saved(noise(), "JPEG", restart_marker_rows=1, progressive=True),
    "grey": saved(GREY, "JPEG"),
    "grey progressive": saved(GREY, "JPEG", progressive=True),
    "own tables": saved(noise(), "JPEG", optimize=True),
    "cmyk": saved(CMYK, "JPEG"),
    "cmyk progressive": saved(CMYK, "JPEG", progressive=True),
    "rgb kept": saved(noise(), "JPEG", keep_rgb=True),
    "several images": saved(noise(), "MPO", **MORE_FRAMES),
    "comment": saved(noise(), "JPEG", comment=b"\xff\xda and \xff\xd9"),
    "resolution": saved(noise(), "JPEG", dpi=(300, 300)),
    "more after its end": JPEG + PROGRESSIVE,
    "junk at its start": after_start(JPEG, bytes(500) + b"\xff\xff\xff\0\xff\xd3"),
    "fillers": JPEG.replace(b"\xff\xc4", b"\xff\xff\xff\xff\xc4"),
    "flash photograph": after_start(JPEG, segment(0xE2, b"FPXR\0" + bytes(100))),
    "16 bits": interlaced(DEEP),
    "interlaced": interlaced(np.asarray(noise())),
    "interlaced, transparent": interlaced(np.asarray(noise(channels=4))),
    "palette": saved(noise().quantize(200), "PNG"),
    "black and white": saved(GREY.convert("1"), "PNG"),
    "animated png": frames_of_png(PNG),
    "text": before(b"IDAT", PNG, chunk(b"tEXt", b"Software\0own") * 100),
    "webp": saved(noise(), "WEBP"),
    "lossless webp": saved(noise(), "WEBP", lossless=True),
    "animated webp": saved(noise(), "WEBP", lossless=True, **MORE_FRAMES),
}
for number in range(1, 9):
    FILES[f"jpeg, orientation {number}"] = saved(noise(), "JPEG", exif=b"Exif\0\0" + exif(number))
    FILES[f"png, orientation {number}"] = saved(noise(), "PNG", exif=exif(number))
    FILES[f"webp, orientation {number}"] = saved(noise(), "WEBP", exif=exif(number))
FILES |= {
    "xmp of a jpeg": saved(noise(), "JPEG", xmp=XMP),
    "xmp of a webp": saved(noise(), "WEBP", xmp=XMP),
    "xmp of a png": before(b"IDAT", PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "imagemagick": before(
        b"IDAT",
        PNG,
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      38\n" + exif(8).hex().encode()),
    ),
    "exif at the end": before(b"IEND", PNG, chunk(b"eXIf", exif(3))),
}


def pillows(data: bytes) -> Image.Image:
    """As it was read before anything was left out of the file."""
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_pixels(data):
    raster, _ = with_notes(lambda: decode(data, LIMITS, "image 1"), "image 1")
    expected = pillows(data)
    assert (raster.width, raster.height) == expected.size
    assert raster.rgb == expected.tobytes()


def test_scans_are_counted_as_encoders_write_them():
    work = DecodeWork(10.0, "image 1")
    assert plain_jpeg(JPEG, work).num_scans == 1
    assert plain_jpeg(PROGRESSIVE, work).num_scans == 10
    assert plain_jpeg(saved(noise(), "MPO", **MORE_FRAMES), work).num_scans == 1


def test_all_of_a_long_profile_is_kept():
    """It does not fit into one segment."""
    profile = np.random.default_rng(0).bytes(200_000)
    plain = plain_jpeg(saved(noise(), "JPEG", icc_profile=profile), DecodeWork(10.0, "image 1"))
    assert Image.open(io.BytesIO(plain.data)).info["icc_profile"] == profile


@pytest.mark.parametrize("num_bytes", range(PIECE_BYTES - 8, PIECE_BYTES))
def test_a_marker_is_found_wherever_a_search_ends(num_bytes):
    data = JPEG[:-2] + bytes(num_bytes - len(JPEG)) + JPEG[-2:]
    plain = plain_jpeg(data + JPEG, DecodeWork(10.0, "image 1"))
    assert plain.data.endswith(bytes(9) + JPEG[-2:])


PIECES = st.one_of(
    # After a filler the first byte would be a marker.
    st.binary(max_size=40).map(lambda data: b"\0" + data.replace(b"\xff", b"\xff\0")),
    st.binary(max_size=40).map(lambda data: segment(0xFE, data)),
    st.builds(segment, st.sampled_from([0xE1, 0xE3, 0xED, 0xEF]), st.binary(max_size=40)),
    st.sampled_from([b"\xff", b"\xff\xff", b"\xff\xd5", b"\xff\x00"]),
)


@settings(max_examples=60)
@given(st.lists(PIECES, max_size=8), st.booleans())
def test_what_stands_between_segments_changes_no_pixel(pieces, is_progressive):
    data = PROGRESSIVE if is_progressive else JPEG
    inserted = b"".join(pieces)
    if inserted.endswith(b"\xff"):
        inserted += b"\0"
    assert decode(after_start(data, inserted), LIMITS, "image 1") == decode(data, LIMITS, "image 1")
