"""Bring decoded images into one form: upright, in sRGB; and note what could not be kept.

Of all metadata only the orientation is read, by our own code: Pillow would parse every field in
loops of Python, and log a line for each odd one. `note` collects what the caller is to be told of
an image, such as an unusable colour profile.
"""

import io
import re
import struct
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps

Read = TypeVar("Read")

# The notes on the image that this thread is reading: no function on the way has to pass them on.
_NOTES: ContextVar[list[str] | None] = ContextVar("image_notes", default=None)


def note(text: str) -> None:
    """Note something for the caller about the image being read, if `with_notes` collects."""
    notes = _NOTES.get()
    if notes is not None:
        notes.append(text)


def with_notes(read: Callable[[], Read], name: str) -> tuple[Read, list[str]]:
    """Return what `read` returns, and the notes made meanwhile, each after the image's `name`."""
    notes: list[str] = []
    token = _NOTES.set(notes)
    try:
        value = read()
    finally:
        _NOTES.reset(token)
    return value, [f"{name}: {text}" for text in dict.fromkeys(notes)]


# The tag of the orientation in EXIF.
TAG = 0x0112
UPRIGHT = 1
# TIFF types of a single number, as struct formats.
NUMBERS = {1: "B", 3: "H", 4: "L"}
IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# The orientation is near the beginning; metadata can be as long as the file.
MAX_METADATA_CHARS = 2**20
# Keys under which Pillow keeps metadata; ImageMagick writes EXIF into PNGs in hexadecimal.
EXIF, HEX_EXIF, XMP, PNG_XMP = "exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"


def turn_upright(image: Image.Image) -> None:
    """Turn the decoded image as its metadata say, and drop them."""
    number = orientation(image.info)
    for key in (EXIF, HEX_EXIF, XMP, PNG_XMP):
        image.info.pop(key, None)
    # Replaced by EXIF with this one number, so that Pillow has nothing else to parse.
    exif = Image.Exif()
    exif[TAG] = number
    image.info[EXIF] = exif.tobytes()
    ImageOps.exif_transpose(image, in_place=True)


def orientation(info: dict[str | tuple[int, int], Any]) -> int:
    """Return the orientation, 1 to 8, from EXIF or else XMP; 1 if neither has one."""
    exif = info.get(EXIF) or exif_in_hex(info.get(HEX_EXIF, ""))
    number = in_exif(exif) or in_xmp(info.get(XMP) or info.get(PNG_XMP) or b"")
    return number if 1 <= number <= 8 else UPRIGHT


def exif_in_hex(text: str) -> bytes:
    """Return the bytes that ImageMagick wrote: three lines, then lines of hexadecimal digits."""
    digits = "".join(text[:MAX_METADATA_CHARS].split("\n")[3:])
    try:
        return bytes.fromhex(digits[: len(digits) // 2 * 2])
    except ValueError:
        return b""


def in_exif(exif: bytes) -> int:
    """Return the orientation in the first EXIF directory, or 0."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 0
    try:
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", exif, start)
        for at in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHL", exif, at)
            if tag == TAG and kind in NUMBERS and count == 1:
                (number,) = struct.unpack_from(f"{order}{NUMBERS[kind]}", exif, at + 8)
                return int(number)
    except struct.error:
        # The metadata are cut off.
        return 0
    return 0


def in_xmp(xmp: str | bytes) -> int:
    """Return the orientation in an XMP packet, or 0."""
    start = xmp[:MAX_METADATA_CHARS]
    found = IN_XMP.search(start.encode() if isinstance(start, str) else start)
    return int(found[1]) if found else 0


SRGB = ImageCms.createProfile("sRGB")
# The largest difference that cannot be seen: a profile that changes no colour by more is sRGB under
# another name.
SAME = 2
# Profiles of printing presses have about 3 MB.
MAX_PROFILE_BYTES = 4 * 2**20
# Profiles with such elements may have any number of them, each for up to 15 channels: one can take
# minutes, and the conversion cannot be stopped.
COSTLY_TYPE = b"mpet"
IGNORED = "its colour profile cannot be used and was ignored"
BROKEN = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the image in sRGB; ignore a profile that is broken, costly, or of another kind.

    The model was trained on sRGB, and what it generates is shown as sRGB.
    """
    if not profile:
        return image
    if is_costly(profile):
        note(IGNORED)
        return image
    plain, alpha = without_alpha(image)
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            SRGB,
            plain.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if changes_nothing(transform, plain.mode):
            return image
        converted = ImageCms.applyTransform(plain, transform)
    except BROKEN:
        note(IGNORED)
        return image
    assert converted is not None, "not in place"
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def is_costly(profile: bytes) -> bool:
    """Return whether a profile could take very long, even for a few pixels."""
    return len(profile) > MAX_PROFILE_BYTES or COSTLY_TYPE in profile


def without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in a mode that profiles can describe, and the alpha channel, if any."""
    if image.has_transparency_data:
        whole = image.convert("LA" if image.mode in ("LA", "L") else "RGBA")
        return whole.convert("L" if whole.mode == "LA" else "RGB"), whole.getchannel("A")
    if image.mode in ("RGB", "CMYK", "L"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform leaves the colours of an image in that mode as they are."""
    if mode != "RGB":
        return False
    # A coarse grid of all colours is enough to tell sRGB from other profiles.
    steps = np.arange(0, 256, 51, dtype=np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, len(steps), 3)
    seen = ImageCms.applyTransform(Image.fromarray(cube), transform)
    difference = np.asarray(seen).astype(int) - cube
    return int(np.abs(difference).max()) <= SAME
