"""Requests as JSON for a row, with their images set apart for the results store.

Whether this release reads of a job's row the request that was packed, nothing left out.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from hashlib import sha256
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flux_ray.request import DeferredRequest, ImageRequest, Load, Mask, RgbImage, outline_of

REQUEST = TypeAdapter(ImageRequest)
ReadImage = Callable[[dict[str, Any]], RgbImage | Mask]
BLOB = "blob"
MASK = "mask"
# Of a reference's pixels, as its raster says it.
DIGEST = "digest"


@dataclass(frozen=True)
class PackedRequest:
    """`row` is JSON in which an image, or its mask, is its size and its number among `images`.

    These are pixels. A blob is what is kept of one: `compress` makes it.
    """

    row: dict[str, Any]
    images: tuple[bytes, ...]

    @property
    def blobs(self) -> tuple[bytes, ...]:
        """All of them at once."""
        return tuple(map(compress, self.images))


def pack(request: ImageRequest) -> PackedRequest:
    """The request in two parts. Takes a while where the digest of an image is not known."""
    images: list[bytes] = []
    row = packed(request, images)
    assert isinstance(row, dict)
    return PackedRequest(row, tuple(images))


def compress(pixels: bytes) -> bytes:
    """Take the least time; flat images still shrink."""
    return zlib.compress(pixels, 1)


def packed(value: Any, images: list[bytes]) -> Any:
    """Wherever an image stands, in fields yet to come too, it goes to `images`."""
    if isinstance(value, RgbImage):
        return set_apart(value.rgb, value, images) | {DIGEST: value.digest.hex()}
    if isinstance(value, Mask):
        return set_apart(value.marks, value, images) | {"kind": MASK}
    if is_dataclass(value):
        return {each.name: packed(getattr(value, each.name), images) for each in fields(value)}
    if isinstance(value, (tuple, list)):
        return [packed(each, images) for each in value]
    return value


def set_apart(pixels: bytes, image: RgbImage | Mask, images: list[bytes]) -> dict[str, Any]:
    """What stands in the row for them."""
    images.append(pixels)
    return {BLOB: len(images) - 1, "width": image.width, "height": image.height}


def num_blobs(row: Any) -> int:
    """How many images the row tells of."""
    if isinstance(row, dict):
        return 1 if BLOB in row else sum(map(num_blobs, row.values()))
    return sum(map(num_blobs, row)) if isinstance(row, list) else 0


def unpack(row: dict[str, Any], blobs: tuple[bytes, ...], request_id: str) -> ImageRequest:
    """The request as it was offered, under a name of its own. ValueError: it cannot be that.

    Takes a while where there are images.
    """
    return request_of(row, lambda part: image_of(part, blobs[part[BLOB]]), request_id)


def defer(row: dict[str, Any], request_id: str, load: Load) -> DeferredRequest:
    """The same before any pixel of it is there; `load` brings all. ValueError as for `unpack`."""
    request = request_of(row, lambda part: outline(part, request_id), request_id)
    values = {each.name: getattr(request, each.name) for each in fields(request)}
    return DeferredRequest(**values, load=load)


def request_of(row: dict[str, Any], read: ReadImage, request_id: str) -> ImageRequest:
    """The row as a request, with what `read` makes of its images."""
    unknown = row.keys() - ImageRequest.__dataclass_fields__.keys()
    if unknown:
        # Left out, it would be another image.
        raise ValueError(f"a newer flux-ray packed this request: {sorted(unknown)}")
    request: ImageRequest = REQUEST.validate_python(unpacked(row, read))
    return replace(request, request_id=request_id)


def unpacked(value: Any, read: ReadImage) -> Any:
    """The row's values, with its images."""
    if isinstance(value, dict) and BLOB in value:
        return read(value)
    if isinstance(value, dict):
        return {name: unpacked(each, read) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(unpacked(each, read) for each in value)
    return value


def outline(row: dict[str, Any], request_id: str) -> RgbImage | Mask:
    """The image or the mask without its pixels."""
    if row.get("kind") == MASK:
        return Mask(row["width"], row["height"], b"")
    # An older row says no digest: it has something in common with no other request.
    digest = row.get(DIGEST) or sha256(f"{request_id} {row[BLOB]}".encode()).hexdigest()
    return outline_of(row["width"], row["height"], bytes.fromhex(digest))


def size_of(row: dict[str, Any]) -> int:
    """The bytes of an image's pixels, or of a mask."""
    # A row without a kind is older than masks.
    num_bytes: int = row["width"] * row["height"] * (1 if row.get("kind") == MASK else 3)
    return num_bytes


def image_of(row: dict[str, Any], blob: bytes) -> RgbImage | Mask:
    """The image or the mask, if it has the size that the row says."""
    num_bytes = size_of(row)
    try:
        # Never more than that, whatever the blob would grow to.
        pixels = zlib.decompressobj().decompress(blob, num_bytes + 1)
    except zlib.error as error:
        raise ValueError("a stored reference image is damaged") from error
    if len(pixels) != num_bytes:
        raise ValueError("a stored reference image has another size")
    if row.get("kind") == MASK:
        return Mask(row["width"], row["height"], pixels)
    raster = RgbImage(row["width"], row["height"], pixels)
    # Made here, where it holds nobody up; it travels with the pixels.
    if row.get(DIGEST, raster.digest.hex()) != raster.digest.hex():
        raise ValueError("a stored reference image is another one")
    return raster


# What stands in a row for an image.
IMAGE_FIELDS = frozenset({BLOB, "width", "height", "kind", "digest"})


class Unreadable(ValueError):
    """The row says what this release does not know: done by it, it would be another image."""


def check_readable(row: dict[str, Any]) -> None:
    """Raise Unreadable, naming the fields, never what they hold. No image is looked at."""
    try:
        request = REQUEST.validate_python(outlined(row))
    except ValidationError as error:
        names = {".".join(map(str, each["loc"])) for each in error.errors(include_input=False)}
        raise unreadable(names) from None
    if names := set(unread(row, request)):
        raise unreadable(names)


def unreadable(names: set[str]) -> Unreadable:
    """Say which fields."""
    return Unreadable(f"a newer flux-ray packed this request: {sorted(names)}")


def outlined(value: Any) -> Any:
    """The row's values, with images that have no pixels."""
    if isinstance(value, dict) and BLOB in value:
        return outline_in(value)
    if isinstance(value, dict):
        return {name: outlined(each) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(map(outlined, value))
    return value


def outline_in(row: dict[str, Any]) -> RgbImage | Mask:
    """An image or a mask of the row's size."""
    names = row.keys() - IMAGE_FIELDS
    if names or row.get("kind", MASK) != MASK:
        raise unreadable(set(names) or {"kind"})
    return (Mask if "kind" in row else RgbImage)(row["width"], row["height"], b"")


def unread(row: Any, value: Any, name: str = "") -> list[str]:
    """Names of what the row says and the value does not."""
    if isinstance(value, (RgbImage, Mask)):
        return []
    if isinstance(row, dict) and is_dataclass(value):
        fields = value.__dataclass_fields__
        return [
            missing
            for key, each in row.items()
            for missing in (
                unread(each, getattr(value, key), f"{name}{key}.")
                if key in fields
                else [f"{name}{key}"]
            )
        ]
    if isinstance(row, list) and isinstance(value, tuple) and len(row) == len(value):
        pairs = zip(row, value, strict=True)
        return [missing for each, part in pairs for missing in unread(each, part, name)]
    return [] if row == value else [name.rstrip(".")]
