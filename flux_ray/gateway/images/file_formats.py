"""JPEG files with nothing but what their pixels need, if they ask for no more work than real ones.

Pillow would walk over bytes between segments one at a time, and parse metadata of a file that it
only opens. libjpeg passes over all blocks of the image for each scan, though one of 36 bytes.

The work that one image may cost: a decoder that asks for more of its file is stopped.

Threads cannot be stopped from outside. But decoders ask for their file piece by piece, and what is
raised there ends them.

The threads that decode: for the request that came first first, so that it is soon through.

In turns, all requests of a crowd would hold a part of their images, and none would have them all.
But whose image took long goes behind all that wait, or ten such images would keep them waiting. And
large images never have all threads: a small one would wait for the largest of them.

JPEG files without their last bytes, which every viewer shows and Pillow refuses.

PNG files of many chunks: Pillow takes each in a loop of Python, though it is empty.
"""

import asyncio
import heapq
import io
import itertools
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from PIL import Image

from flux_ray.errors import BadReference

FORMATS = ("PNG", "JPEG", "WEBP")


class DecodeWork:
    """Processor seconds of this thread, from now on, for one image however often it is decoded."""

    def __init__(self, max_s: float, name: str) -> None:
        self._until_s = time.thread_time() + max_s
        self._name = name

    def open(self, data: bytes) -> Image.Image:
        """Open the file, to be decoded within the limit. Raises what Pillow raises."""
        return Image.open(WatchedFile(data, self), formats=FORMATS)

    def check(self) -> None:
        """Raise BadReference if it took longer than it may."""
        if time.thread_time() > self._until_s:
            raise self.exceeded()

    def exceeded(self) -> BadReference:
        """Return the error for an image that takes, or would take, more than it may."""
        return BadReference(
            f"{self._name} takes too long to decode: save it as a plain (baseline) JPEG or PNG",
            "image",
        )


class WatchedFile(io.BytesIO):
    """A file that is not read any further once its image took too long."""

    def __init__(self, data: bytes, work: DecodeWork) -> None:
        super().__init__(data)
        self._work = work

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file. Raises BadReference."""
        self._work.check()
        return super().read(size)


T = TypeVar("T")

# A request's order, its number among all that waited, and what it waits for.
Waiting = tuple[int, int, asyncio.Future[None]]

# Before all that have yet to begin.
FIRST = -1
# Of a processor: what most images of 20 megapixels take.
LONG_S = 1.0


class Decoders:
    """Runs calls on threads of its own, called from the event loop.

    What else asks for threads does not wait for images.
    """

    def __init__(self, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._num_free = num_threads
        self._num_free_for_large = max(num_threads - 1, 1)
        self._numbers = itertools.count()
        # By whether they are large.
        self._waiting: dict[bool, list[Waiting]] = {False: [], True: []}

    def next_order(self) -> int:
        """Return the place of a request that comes now."""
        return next(self._numbers)

    def order_after(self, order: int, seconds: float) -> int:
        """Return the place of a request from now on, one of whose images took so many seconds."""
        return order if seconds < LONG_S else self.next_order()

    async def run(self, order: int, call: Callable[[], T], is_large: bool = False) -> T:
        """Return what the call returns, once it is its turn; the lowest `order` comes first."""
        await self._enter(order, is_large)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        finally:
            self._leave(is_large)

    async def _enter(self, order: int, is_large: bool) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting[is_large], (order, next(self._numbers), turn))
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(is_large)
            raise

    def _leave(self, is_large: bool) -> None:
        self._num_free += 1
        self._num_free_for_large += is_large
        self._let_in()

    def _let_in(self) -> None:
        """Begin what may begin, the lowest order first."""
        while self._num_free:
            lanes = [False, True] if self._num_free_for_large else [False]
            lanes = [is_large for is_large in lanes if self._waiting[is_large]]
            if not lanes:
                return
            is_large = min(lanes, key=lambda is_large: self._waiting[is_large][0][:2])
            _, _, turn = heapq.heappop(self._waiting[is_large])
            if not turn.done():
                turn.set_result(None)
                self._num_free -= 1
                self._num_free_for_large -= is_large


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return what the call returns, and the seconds of a processor that this thread took for it."""
    started_s = time.thread_time()
    return call(), time.thread_time() - started_s


# Two at least, so that there is one for small images.
DECODERS = Decoders(min(8, max(2, os.cpu_count() or 1)))


END = b"\xff\xd9"
# Read as pixels these are none that zeros would be, with which libjpeg fills what is missing.
FILLER = b"\x5a\xa5\x3c\xc3" * 64


def with_its_end(data: bytes, work: DecodeWork) -> Image.Image | None:
    """Return the decoded image of the file, if nothing but its end is missing; else None.

    Raises what Pillow raises where it is broken otherwise, and BadReference.
    """
    data = data.rstrip(b"\xff")
    filled = pixel_sum(work.open(data + FILLER + END))
    image = work.open(data + END)
    # Where pixels are missing, what stands in their place shows.
    return image if pixel_sum(image) == filled else None


def pixel_sum(image: Image.Image) -> int:
    """Return a checksum of its pixels, which are decoded now."""
    return zlib.crc32(image.tobytes())


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


PNG_START = b"\x89PNG\r\n\x1a\n"
# One a row of the longest image that is read, and as many again.
MAX_CHUNKS = 20_000


def check_chunks(data: bytes, work: DecodeWork) -> None:
    """Raise BadReference if the file has more chunks than any real one."""
    at, num_chunks = len(PNG_START), 0
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        num_chunks += 1
        if num_chunks > MAX_CHUNKS:
            raise work.exceeded()
