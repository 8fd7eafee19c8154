"""JPEG files with nothing but what their pixels need, if they ask for no more work than real ones.

Pillow would walk over bytes between segments one at a time, and parse metadata of a file that it
only opens. libjpeg passes over all blocks of the image for each scan, though one of 36 bytes.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from flux_ray.gateway.images.decode_work import DecodeWork

# Real files have about ten scans, and at most hundreds of segments: a colour profile has up to 255.
MAX_SCANS = 100
MAX_SEGMENTS = 2000
# Of an image that has as many pixels as one may have: 20 megapixels take 22 ms a scan, or more.
MAX_SCANS_OF_LARGEST = 32

# All else after 0xFF is data, a restart, a filler, or junk, which libjpeg passes over as well.
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
# Searched in pieces: the event loop stands still during each, 10 ms where all bytes are 0xFF.
PIECE_BYTES = 2**19
JPEG_START = b"\xff\xd8\xff"
JPG, SOI, EOI, SOS = 0xC8, 0xD8, 0xD9, 0xDA
APP0, APP1, APP2, APP14, APP15, COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
# No length follows these; libjpeg refuses files with most of them.
BARE = {JPG, SOI, EOI, *range(APP15 + 1, COMMENT)}
# No browser reads arithmetic coding; it packs seconds of work into a few bytes, and has to have
# its file in one piece.
ARITHMETIC = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
PROFILE, EXIF, XMP = b"ICC_PROFILE\0", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


class Segment(NamedTuple):
    """Where its marker begins, and where its payload, if it has one, ends."""

    marker: int
    start: int
    end: int

    def begins_with(self, name: bytes, data: bytes) -> bool:
        """Say whether its payload has that name."""
        return data.startswith(name, self.start + 4)

    def is_needed(self, data: bytes) -> bool:
        """Say whether pixels look different without it: APP0 and APP14 tell how colours are coded.

        Of APP2 that is the colour profile; it also lists further images of the file.
        """
        if self.marker == APP2:
            return self.begins_with(PROFILE, data)
        return self.marker in (APP0, APP14) or not APP0 < self.marker <= COMMENT


class PlainJpeg(NamedTuple):
    """A JPEG without metadata, and what of those say which way is up."""

    data: bytes
    num_scans: int = 0
    exif: bytes | None = None
    xmp: bytes | None = None

    def is_costly(self, num_pixels: int, max_pixels: int) -> bool:
        """Say whether it has too many scans, for one of so many pixels of at most `max_pixels`."""
        most = min(MAX_SCANS, MAX_SCANS_OF_LARGEST * max_pixels // num_pixels)
        return self.num_scans > most

    def metadata(self) -> dict[str, bytes]:
        """Return these as Pillow keeps them."""
        found = {"exif": self.exif, "xmp": self.xmp}
        return {key: value for key, value in found.items() if value is not None}


def plain_jpeg(data: bytes, work: DecodeWork) -> PlainJpeg:
    """Return the first image of the file, as far as the file goes. Raises BadReference."""
    found = list(segments(data, work))
    scans = [segment for segment in found if segment.marker == SOS]
    head = [segment for segment in found if not scans or segment.start < scans[0].start]
    pieces = [data[part.start : part.end] for part in head if part.is_needed(data)]
    if scans:
        # Its end, if it has one, is the last that was found.
        end = found[-1].end if found[-1].marker == EOI else len(data)
        pieces.append(data[scans[0].start : end])
    exif, xmp = (first_named(name, head, data) for name in (EXIF, XMP))
    return PlainJpeg(JPEG_START[:2] + b"".join(pieces), len(scans), exif, xmp)


def segments(data: bytes, work: DecodeWork) -> Iterator[Segment]:
    """Yield what follows the first marker, up to the first end of an image, scans' data left out.

    Raises BadReference where it is more than in any real file.
    """
    at, num_segments = 2, 0
    while (start := marker_after(at, data)) is not None:
        marker = data[start + 1]
        num_segments += 1
        if num_segments > MAX_SEGMENTS or marker in ARITHMETIC:
            raise work.exceeded()
        has_length = marker not in BARE
        length = int.from_bytes(data[start + 2 : start + 4], "big") if has_length else 0
        at = start + 2 + length
        yield Segment(marker, start, at)
        if marker == EOI:
            return


def marker_after(at: int, data: bytes) -> int | None:
    """Return where the next marker begins, from `at` on."""
    for start in range(at, len(data), PIECE_BYTES):
        # Also one that begins with the last byte of the piece.
        if match := MARKER.search(data, start, start + PIECE_BYTES + 1):
            return match.start()
    return None


def first_named(name: bytes, found: list[Segment], data: bytes) -> bytes | None:
    """Return what follows that name in the first APP1 segment that begins with it."""
    for segment in found:
        if segment.marker == APP1 and segment.begins_with(name, data):
            return data[segment.start + 4 + len(name) : segment.end]
    return None
