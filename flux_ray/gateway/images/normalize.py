"""Colours as people see them: images with a colour profile of their own to sRGB.

What the caller is told of an image that was read: what of it could not be used.

Which way is up: the one field of an image's metadata that is read.

Pillow would parse all of them, in loops of Python and with a line in the log for each odd one.
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

# Of the image that is being read, in the thread that reads it.
_NOTES: ContextVar[list[str] | None] = ContextVar("image_notes", default=None)


def note(text: str) -> None:
    """Tell the caller of the image that is being read, if somebody collects that."""
    notes = _NOTES.get()
    if notes is not None:
        notes.append(text)


def with_notes(read: Callable[[], Read], name: str) -> tuple[Read, list[str]]:
    """Return what `read` returns, and what was noted meanwhile of the image called `name`."""
    notes: list[str] = []
    token = _NOTES.set(notes)
    try:
        value = read()
    finally:
        _NOTES.reset(token)
    return value, [f"{name}: {text}" for text in dict.fromkeys(notes)]


TAG = 0x0112
UPRIGHT = 1
# Of the TIFF types: which say one number, how long it is, and how it is written.
NUMBERS = {1: "B", 3: "H", 4: "L"}
IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# It stands at the beginning.
MAX_METADATA_CHARS = 2**20
# Where Pillow keeps them: of PNG also as ImageMagick writes them.
EXIF, HEX_EXIF, XMP, PNG_XMP = "exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"


def turn_upright(image: Image.Image) -> None:
    """Turn the decoded image as its metadata say, and forget them."""
    number = orientation(image.info)
    for key in (EXIF, HEX_EXIF, XMP, PNG_XMP):
        image.info.pop(key, None)
    exif = Image.Exif()
    exif[TAG] = number
    image.info[EXIF] = exif.tobytes()
    ImageOps.exif_transpose(image, in_place=True)


def orientation(info: dict[str | tuple[int, int], Any]) -> int:
    """Return the number, 1 to 8, by EXIF or else by XMP; 1 where neither says one."""
    exif = info.get(EXIF) or exif_in_hex(info.get(HEX_EXIF, ""))
    number = in_exif(exif) or in_xmp(info.get(XMP) or info.get(PNG_XMP) or b"")
    return number if 1 <= number <= 8 else UPRIGHT


def exif_in_hex(text: str) -> bytes:
    """Return the bytes of what ImageMagick writes: three lines, then lines of hexadecimals."""
    digits = "".join(text[:MAX_METADATA_CHARS].split("\n")[3:])
    try:
        return bytes.fromhex(digits[: len(digits) // 2 * 2])
    except ValueError:
        return b""


def in_exif(exif: bytes) -> int:
    """Return the number in the first directory; 0 where there is none."""
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
        # It is cut off.
        return 0
    return 0


def in_xmp(xmp: str | bytes) -> int:
    """Return the number that it says; 0 where it says none."""
    start = xmp[:MAX_METADATA_CHARS]
    found = IN_XMP.search(start.encode() if isinstance(start, str) else start)
    return int(found[1]) if found else 0


SRGB = ImageCms.createProfile("sRGB")
# What cannot be seen: a profile that changes no colour by more is sRGB under another name.
SAME = 2
# Those of presses have some 3 MB.
MAX_PROFILE_BYTES = 4 * 2**20
# Elements in any number, of up to 15 channels each: minutes a profile, which nobody can stop.
COSTLY_TYPE = b"mpet"
IGNORED = "its colour profile cannot be used and was ignored"
BROKEN = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the image in sRGB; a profile that is broken, costly, or of another kind is ignored.

    The model has seen sRGB only, and what it generates is taken for sRGB.
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
    """Say whether the colours of a few pixels may take as long as it likes."""
    return len(profile) > MAX_PROFILE_BYTES or COSTLY_TYPE in profile


def without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in a mode that a profile may be of, and the alpha channel if any."""
    if image.has_transparency_data:
        whole = image.convert("LA" if image.mode in ("LA", "L") else "RGBA")
        return whole.convert("L" if whole.mode == "LA" else "RGB"), whole.getchannel("A")
    if image.mode in ("RGB", "CMYK", "L"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Say whether the colours of an image in that mode would stay what they are."""
    if mode != "RGB":
        return False
    steps = np.arange(0, 256, 51, dtype=np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, len(steps), 3)
    seen = ImageCms.applyTransform(Image.fromarray(cube), transform)
    difference = np.asarray(seen).astype(int) - cube
    return int(np.abs(difference).max()) <= SAME
