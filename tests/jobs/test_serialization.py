"""Requests in two parts: JSON for the row, images for the results store."""

import json
from dataclasses import replace

import pytest

from flux_ray.jobs.serialization import num_blobs, pack, unpack
from flux_ray.request import Encoding, ImageRequest, Mask, RgbImage

RED = RgbImage(3, 2, b"\xff\x00\x00" * 6)
BLUE = RgbImage(2, 2, b"\x00\x00\xff" * 4)
REQUEST = ImageRequest(
    "r", "tiny", "a “red” circle", 64, 48, 4, 1.5, 2**64 - 1, 2, (RED, BLUE), Encoding("webp", 80)
)


def test_a_request_comes_back_from_json():
    packed = pack(REQUEST)
    row = json.loads(json.dumps(packed.row))
    assert num_blobs(row) == len(packed.blobs) == 2
    assert unpack(row, packed.blobs, "r") == REQUEST


def test_a_mask_comes_back_too():
    masked = replace(REQUEST, mask=Mask(3, 2, b"\xff\0\0\xff\0\0"))
    packed = pack(masked)
    row = json.loads(json.dumps(packed.row))
    assert num_blobs(row) == len(packed.blobs) == 3
    assert unpack(row, packed.blobs, "r") == masked
    with pytest.raises(ValueError, match="another size"):
        unpack(row, (*packed.blobs[:2], packed.blobs[0]), "r")


def test_a_row_from_before_masks_has_none():
    packed = pack(REQUEST)
    row = {name: value for name, value in packed.row.items() if name != "mask"}
    assert unpack(row, packed.blobs, "r") == REQUEST


def test_an_attempt_has_a_name_of_its_own():
    packed = pack(REQUEST)
    assert unpack(packed.row, packed.blobs, "attempt 2").request_id == "attempt 2"


def test_no_image_is_in_the_row():
    row = json.dumps(pack(REQUEST).row)
    assert "rgb" not in row


def test_a_field_of_a_newer_release_is_not_left_out():
    row = pack(REQUEST).row | {"sampler": "another"}
    with pytest.raises(ValueError, match="sampler"):
        unpack(row, pack(REQUEST).blobs, "r")


@pytest.mark.parametrize("blob", [b"", b"no zlib", pack(REQUEST).blobs[1]])
def test_a_damaged_image_is_no_image(blob):
    packed = pack(REQUEST)
    with pytest.raises(ValueError, match="stored reference image"):
        unpack(packed.row, (blob, packed.blobs[1]), "r")


def test_a_blob_grows_no_further_than_its_image():
    bomb = pack(
        ImageRequest("r", "t", "", 1, 1, 1, 1.0, 1, 1, (RgbImage(4000, 4000, bytes(48_000_000)),))
    )
    row = pack(REQUEST).row
    with pytest.raises(ValueError, match="another size"):
        unpack(row, (bomb.blobs[0], bomb.blobs[0]), "r")
