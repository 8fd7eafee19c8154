"""Requests as JSON for a row, with their pictures set apart for the results store."""

import zlib
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from flux_ray.request import ImageRequest, Mask, Raster

REQUEST = TypeAdapter(ImageRequest)
BLOB = "blob"
MASK = "mask"


@dataclass(frozen=True)
class PackedRequest:
    """`row` is JSON in which a picture, or its mask, is its size and its number among `blobs`."""

    row: dict[str, Any]
    blobs: tuple[bytes, ...]


def pack(request: ImageRequest) -> PackedRequest:
    """The request in two parts. Takes a while where there are pictures."""
    blobs: list[bytes] = []
    row = packed(request, blobs)
    assert isinstance(row, dict)
    return PackedRequest(row, tuple(blobs))


def packed(value: Any, blobs: list[bytes]) -> Any:
    """Wherever a picture stands, in fields yet to come too, it goes to `blobs`."""
    if isinstance(value, Raster):
        return set_apart(value.rgb, value, blobs)
    if isinstance(value, Mask):
        return set_apart(value.marks, value, blobs) | {"kind": MASK}
    if is_dataclass(value):
        return {each.name: packed(getattr(value, each.name), blobs) for each in fields(value)}
    if isinstance(value, (tuple, list)):
        return [packed(each, blobs) for each in value]
    return value


def set_apart(pixels: bytes, picture: Raster | Mask, blobs: list[bytes]) -> dict[str, Any]:
    """What stands in the row for them."""
    # Level 1: the least time, and flat pictures still shrink.
    blobs.append(zlib.compress(pixels, 1))
    return {BLOB: len(blobs) - 1, "width": picture.width, "height": picture.height}


def num_blobs(row: Any) -> int:
    """How many pictures the row tells of."""
    if isinstance(row, dict):
        return 1 if BLOB in row else sum(map(num_blobs, row.values()))
    return sum(map(num_blobs, row)) if isinstance(row, list) else 0


def unpack(row: dict[str, Any], blobs: tuple[bytes, ...], request_id: str) -> ImageRequest:
    """The request as it was offered, under a name of its own. ValueError: it cannot be that."""
    unknown = row.keys() - ImageRequest.__dataclass_fields__.keys()
    if unknown:
        # Left out, it would be another picture.
        raise ValueError(f"a newer flux-ray packed this request: {sorted(unknown)}")
    request: ImageRequest = REQUEST.validate_python(unpacked(row, blobs))
    return replace(request, request_id=request_id)


def unpacked(value: Any, blobs: tuple[bytes, ...]) -> Any:
    """The row's values, with its pictures."""
    if isinstance(value, dict) and BLOB in value:
        return picture_of(value, blobs[value[BLOB]])
    if isinstance(value, dict):
        return {name: unpacked(each, blobs) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(unpacked(each, blobs) for each in value)
    return value


def picture_of(row: dict[str, Any], blob: bytes) -> Raster | Mask:
    """The picture or the mask, if it has the size that the row says."""
    # A row without a kind is older than masks.
    is_mask = row.get("kind") == MASK
    num_bytes = row["width"] * row["height"] * (1 if is_mask else 3)
    try:
        # Never more than that, whatever the blob would grow to.
        pixels = zlib.decompressobj().decompress(blob, num_bytes + 1)
    except zlib.error as error:
        raise ValueError("a stored reference picture is damaged") from error
    if len(pixels) != num_bytes:
        raise ValueError("a stored reference picture has another size")
    kind = Mask if is_mask else Raster
    return kind(row["width"], row["height"], pixels)
