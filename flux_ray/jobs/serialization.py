"""Requests as JSON for a job's row, with their images apart, for the results store; and back.

`pack` and `unpack` are the two directions; `defer` reads a request before its images are loaded.
`check_readable` compares the row with the request read of it, and refuses a row of a newer release
of which this one would leave something out.
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
# The key of the digest of an image, by which encodings of it are cached, or of a mask.
DIGEST = "digest"


@dataclass(frozen=True)
class PackedRequest:
    """A request in two parts: JSON for the row, and the pixels of its images and mask.

    In `row` an image or a mask is an object with its size and its index in `images`. What is stored
    of the pixels is a blob: `compress` makes it.
    """

    row: dict[str, Any]
    images: tuple[bytes, ...]

    @property
    def blobs(self) -> tuple[bytes, ...]:
        """Return all images compressed."""
        return tuple(map(compress, self.images))


def pack(request: ImageRequest) -> PackedRequest:
    """Return the request in two parts. Slow if the digest of an image is not yet computed."""
    images: list[bytes] = []
    row = packed(request, images)
    assert isinstance(row, dict)
    return PackedRequest(row, tuple(images))


def compress(pixels: bytes) -> bytes:
    """Compress pixels at the fastest level: flat images still shrink a lot."""
    return zlib.compress(pixels, 1)


def packed(value: Any, images: list[bytes]) -> Any:
    """Return the value as JSON, with the pixels of all images in it appended to `images`.

    Images are found by their type, so that fields that are added later need no change here.
    """
    if isinstance(value, RgbImage):
        return set_apart(value.rgb, value, images)
    if isinstance(value, Mask):
        return set_apart(value.marks, value, images) | {"kind": MASK}
    if is_dataclass(value):
        return {each.name: packed(getattr(value, each.name), images) for each in fields(value)}
    if isinstance(value, (tuple, list)):
        return [packed(each, images) for each in value]
    return value


def set_apart(pixels: bytes, image: RgbImage | Mask, images: list[bytes]) -> dict[str, Any]:
    """Append the pixels to `images`, and return what stands for them in the row."""
    images.append(pixels)
    size = {"width": image.width, "height": image.height}
    return {BLOB: len(images) - 1, DIGEST: image.digest.hex()} | size


def num_blobs(row: Any) -> int:
    """Count the images and masks in a row."""
    if isinstance(row, dict):
        return 1 if BLOB in row else sum(map(num_blobs, row.values()))
    return sum(map(num_blobs, row)) if isinstance(row, list) else 0


def unpack(row: dict[str, Any], blobs: tuple[bytes, ...], request_id: str) -> ImageRequest:
    """Return the request of a row with its images, under a new id. Slow if it has images.

    Raises ValueError if the row or a blob cannot be read, or is not what was packed.
    """
    return request_of(row, lambda part: image_of(part, blobs[part[BLOB]]), request_id)


def defer(row: dict[str, Any], request_id: str, load: Load) -> DeferredRequest:
    """Return the request of a row without pixels, which `load` brings later.

    Raises ValueError as `unpack` does.
    """
    request = request_of(row, lambda part: outline(part, request_id), request_id)
    values = {each.name: getattr(request, each.name) for each in fields(request)}
    return DeferredRequest(**values, load=load)


def request_of(row: dict[str, Any], read: ReadImage, request_id: str) -> ImageRequest:
    """Return the request of a row, in which `read` makes the images. Raises ValueError."""
    unknown = row.keys() - ImageRequest.__dataclass_fields__.keys()
    if unknown:
        # Without the unknown field it would be another request, with another image.
        raise ValueError(f"a newer flux-ray packed this request: {sorted(unknown)}")
    request: ImageRequest = REQUEST.validate_python(unpacked(row, read))
    return replace(request, request_id=request_id)


def unpacked(value: Any, read: ReadImage) -> Any:
    """Return the row's JSON with tuples for lists, and with what `read` makes of each image."""
    if isinstance(value, dict) and BLOB in value:
        return read(value)
    if isinstance(value, dict):
        return {name: unpacked(each, read) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(unpacked(each, read) for each in value)
    return value


def outline(row: dict[str, Any], request_id: str) -> RgbImage | Mask:
    """Return the image or mask of a row without pixels, but with the digest of them."""
    # Older rows have no digest: a made-up one shares no cached encoding with other requests.
    digest = row.get(DIGEST) or sha256(f"{request_id} {row[BLOB]}".encode()).hexdigest()
    return outline_of(kind_of(row)(row["width"], row["height"], b""), bytes.fromhex(digest))


def size_of(row: dict[str, Any]) -> int:
    """Return how many bytes the pixels of an image or a mask have."""
    num_bytes: int = row["width"] * row["height"] * (1 if kind_of(row) is Mask else 3)
    return num_bytes


def image_of(row: dict[str, Any], blob: bytes) -> RgbImage | Mask:
    """Return the image or mask of a blob.

    Raises ValueError unless it has the size and the digest that the row says.
    """
    num_bytes = size_of(row)
    try:
        # Bounded: a damaged or malicious blob may expand to any size.
        pixels = zlib.decompressobj().decompress(blob, num_bytes + 1)
    except zlib.error as error:
        raise ValueError("a stored reference image is damaged") from error
    if len(pixels) != num_bytes:
        raise ValueError("a stored reference image has another size")
    image = kind_of(row)(row["width"], row["height"], pixels)
    # Computed here, in a thread, and not where the request is used: it is kept with the pixels.
    if row.get(DIGEST, image.digest.hex()) != image.digest.hex():
        raise ValueError("a stored reference image is another one")
    return image


def kind_of(row: dict[str, Any]) -> type[RgbImage] | type[Mask]:
    """Return the type of an image in a row: `kind` is only in masks' objects."""
    return Mask if row.get("kind") == MASK else RgbImage


# All keys that the object of an image may have in a row.
IMAGE_FIELDS = frozenset({BLOB, "width", "height", "kind", "digest"})


class Unreadable(ValueError):
    """A row has fields that this release does not know: without them the image would differ."""


def check_readable(row: dict[str, Any]) -> None:
    """Raise Unreadable unless this release reads all of the row; no image is loaded.

    The error names fields and never their values, as it is logged.
    """
    try:
        request = REQUEST.validate_python(outlined(row))
    except ValidationError as error:
        names = {".".join(map(str, each["loc"])) for each in error.errors(include_input=False)}
        raise unreadable(names) from None
    if names := set(unread(row, request)):
        raise unreadable(names)


def unreadable(names: set[str]) -> Unreadable:
    """Return the error that names these fields."""
    return Unreadable(f"a newer flux-ray packed this request: {sorted(names)}")


def outlined(value: Any) -> Any:
    """Return the row's JSON with tuples for lists and with empty images, for validation."""
    if isinstance(value, dict) and BLOB in value:
        return outline_in(value)
    if isinstance(value, dict):
        return {name: outlined(each) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(map(outlined, value))
    return value


def outline_in(row: dict[str, Any]) -> RgbImage | Mask:
    """Return an empty image or mask of the row's size. Raises Unreadable for unknown keys."""
    names = row.keys() - IMAGE_FIELDS
    if names or row.get("kind", MASK) != MASK:
        raise unreadable(set(names) or {"kind"})
    return (Mask if "kind" in row else RgbImage)(row["width"], row["height"], b"")


def unread(row: Any, value: Any, name: str = "") -> list[str]:
    """Return the dotted names of what the row has and the validated value has not."""
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
