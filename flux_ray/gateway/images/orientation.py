"""Which way is up: the one field of an image's metadata that is read.

Pillow would parse all of them, in loops of Python and with a line in the log for each odd one.
"""

import re
import struct
from typing import Any

from PIL import Image, ImageOps

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
