"""Guard the decoder: plain files only, limited work for each image, and fair use of the threads.

- `DecodeWork` limits the processor time of one image. Threads cannot be stopped from outside, but
  decoders read their file piece by piece, and an error raised there ends them.
- `Decoders` runs decoding on a few threads, earliest request first. Taking turns, all requests of a
  crowd would hold a part of their images, and none all of them. A request whose image took long
  goes behind all that wait, or ten such images would keep the others waiting. Large images never
  take all threads, so that small ones do not wait for the largest.
- `with_its_end` accepts a JPEG without its last bytes, which every viewer shows and Pillow refuses.
- `plain_jpeg` strips a JPEG to what its pixels need, and counts its scans. Pillow would walk over
  bytes between segments one at a time and parse unused metadata; libjpeg visits all blocks of the
  image for each scan, even one of 36 bytes.
- `check_chunks` limits the chunks of a PNG: Pillow reads each, even an empty one, in a Python loop.
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
    """The processor time that this thread may use for one image, however often it is decoded.

    It starts when the object is made, and counts this thread only.
    """

    def __init__(self, max_s: float, name: str) -> None:
        self._until_s = time.thread_time() + max_s
        self._name = name

    def open(self, data: bytes) -> Image.Image:
        """Open the file so that decoding it stays within the limit. Raise what Pillow raises."""
        return Image.open(WatchedFile(data, self), formats=FORMATS)

    def check(self) -> None:
        """Raise BadReference if the time is used up."""
        if time.thread_time() > self._until_s:
            raise self.exceeded()

    def exceeded(self) -> BadReference:
        """Return the error for an image that takes, or would take, too much work."""
        return BadReference(
            f"{self._name} takes too long to decode: save it as a plain (baseline) JPEG or PNG",
            "image",
        )


class WatchedFile(io.BytesIO):
    """A file that refuses to be read once its image has used up its time."""

    def __init__(self, data: bytes, work: DecodeWork) -> None:
        super().__init__(data)
        self._work = work

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like any file. Raise BadReference once the time is used up."""
        self._work.check()
        return super().read(size)


T = TypeVar("T")

# A request's order, a number that makes entries unique, and the future that lets it go on.
Waiting = tuple[int, int, asyncio.Future[None]]

# An order before all requests that have not begun.
FIRST = -1
# Processor seconds above which an image counts as slow; most images of 20 megapixels take less.
LONG_S = 1.0


class Decoders:
    """A few threads for decoding; awaited from the event loop.

    They are separate from the loop's own threads, so that nothing else waits for images.
    """

    def __init__(self, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._num_free = num_threads
        self._num_free_for_large = max(num_threads - 1, 1)
        self._numbers = itertools.count()
        # The waiting requests, those with a large image apart.
        self._waiting: dict[bool, list[Waiting]] = {False: [], True: []}

    def next_order(self) -> int:
        """Return the order of a request that comes now."""
        return next(self._numbers)

    def order_after(self, order: int, seconds: float) -> int:
        """Return the request's next order: its own, or a new one at the end after a slow image."""
        return order if seconds < LONG_S else self.next_order()

    async def run(self, order: int, call: Callable[[], T], is_large: bool = False) -> T:
        """Return what `call` returns, once a thread is free for it, the lowest `order` first."""
        await self._enter(order, is_large)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        finally:
            self._leave(is_large)

    async def _enter(self, order: int, is_large: bool) -> None:
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting[is_large], (order, next(self._numbers), admitted))
        self._let_in()
        try:
            await admitted
        except asyncio.CancelledError:
            # It was let in while it was cancelled: give the thread back, or it would be lost for
            # good.
            if admitted.done() and not admitted.cancelled():
                self._leave(is_large)
            raise

    def _leave(self, is_large: bool) -> None:
        self._num_free += 1
        self._num_free_for_large += is_large
        self._let_in()

    def _let_in(self) -> None:
        """Let in requests while threads are free, the lowest order first."""
        while self._num_free:
            lanes = [False, True] if self._num_free_for_large else [False]
            lanes = [is_large for is_large in lanes if self._waiting[is_large]]
            if not lanes:
                return
            is_large = min(lanes, key=lambda is_large: self._waiting[is_large][0][:2])
            _, _, admitted = heapq.heappop(self._waiting[is_large])
            if not admitted.done():
                admitted.set_result(None)
                self._num_free -= 1
                self._num_free_for_large -= is_large


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return what `call` returns, and the processor seconds that this thread took for it."""
    started_s = time.thread_time()
    return call(), time.thread_time() - started_s


# At least two, so that one is always left for small images.
DECODERS = Decoders(min(8, max(2, os.cpu_count() or 1)))


END = b"\xff\xd9"
# Filler that, read as pixels, differs from the zeros with which libjpeg fills what is missing.
FILLER = b"\x5a\xa5\x3c\xc3" * 64


def with_its_end(data: bytes, work: DecodeWork) -> Image.Image | None:
    """Return the decoded image if only the end of the file is missing, else None.

    Raise what Pillow raises if it is broken in another way, and BadReference if it takes too long.
    """
    data = data.rstrip(b"\xff")
    filled = pixel_sum(work.open(data + FILLER + END))
    image = work.open(data + END)
    # If pixels are missing, the two images differ by what stands in their place.
    return image if pixel_sum(image) == filled else None


def pixel_sum(image: Image.Image) -> int:
    """Decode the image and return a checksum of its pixels."""
    return zlib.crc32(image.tobytes())


# Real files have about ten scans and at most some hundred segments, as a colour profile has up to
# 255.
MAX_SCANS = 100
MAX_SEGMENTS = 2000
# For an image of the largest size allowed: a scan of 20 megapixels takes 22 ms or more.
MAX_SCANS_OF_LARGEST = 32

# Any other byte after 0xFF means data, a restart, a filler or junk, which libjpeg skips, too.
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
# Searched in pieces, as the search holds the interpreter lock: the event loop stands still during
# each, for 10 ms if all bytes are 0xFF.
PIECE_BYTES = 2**19
JPEG_START = b"\xff\xd8\xff"
JPG, SOI, EOI, SOS = 0xC8, 0xD8, 0xD9, 0xDA
APP0, APP1, APP2, APP14, APP15, COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
# Markers without a length; libjpeg refuses files with most of them.
BARE = {JPG, SOI, EOI, *range(APP15 + 1, COMMENT)}
# No browser reads arithmetic coding. It packs seconds of work into a few bytes, and libjpeg has to
# have the whole file for it, so reading piece by piece could not stop it.
ARITHMETIC = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
PROFILE, EXIF, XMP = b"ICC_PROFILE\0", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


class Segment(NamedTuple):
    """A segment of a JPEG: where its marker begins, and where its payload, if any, ends."""

    marker: int
    start: int
    end: int

    def begins_with(self, name: bytes, data: bytes) -> bool:
        """Return whether its payload begins with that name."""
        return data.startswith(name, self.start + 4)

    def is_needed(self, data: bytes) -> bool:
        """Return whether the pixels would look different without it.

        APP0 and APP14 say how colours are coded. APP2 counts if it is the colour profile; it may
        also list further images of the file.
        """
        if self.marker == APP2:
            return self.begins_with(PROFILE, data)
        return self.marker in (APP0, APP14) or not APP0 < self.marker <= COMMENT


class PlainJpeg(NamedTuple):
    """A JPEG without metadata, and beside it the metadata that say which way is up."""

    data: bytes
    num_scans: int = 0
    exif: bytes | None = None
    xmp: bytes | None = None

    def is_costly(self, num_pixels: int, max_pixels: int) -> bool:
        """Return whether it has too many scans for its size; `max_pixels` is the largest size."""
        most = min(MAX_SCANS, MAX_SCANS_OF_LARGEST * max_pixels // num_pixels)
        return self.num_scans > most

    def metadata(self) -> dict[str, bytes]:
        """Return the metadata under the keys that Pillow uses."""
        found = {"exif": self.exif, "xmp": self.xmp}
        return {key: value for key, value in found.items() if value is not None}


def plain_jpeg(data: bytes, work: DecodeWork) -> PlainJpeg:
    """Return the first image of the file, as far as the file goes. Raise BadReference."""
    found = list(segments(data, work))
    scans = [segment for segment in found if segment.marker == SOS]
    head = [segment for segment in found if not scans or segment.start < scans[0].start]
    pieces = [data[part.start : part.end] for part in head if part.is_needed(data)]
    if scans:
        # The end marker, if there is one, is the last segment found.
        end = found[-1].end if found[-1].marker == EOI else len(data)
        pieces.append(data[scans[0].start : end])
    exif, xmp = (first_named(name, head, data) for name in (EXIF, XMP))
    return PlainJpeg(JPEG_START[:2] + b"".join(pieces), len(scans), exif, xmp)


def segments(data: bytes, work: DecodeWork) -> Iterator[Segment]:
    """Yield the segments after the first marker, without scan data, up to the first end.

    Raise BadReference if there are more than in any real file, or if they are arithmetically coded.
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
    """Return where the next marker begins, at or after `at`, or None."""
    for start in range(at, len(data), PIECE_BYTES):
        # One byte more, for a marker that begins with the last byte of the piece.
        if match := MARKER.search(data, start, start + PIECE_BYTES + 1):
            return match.start()
    return None


def first_named(name: bytes, found: list[Segment], data: bytes) -> bytes | None:
    """Return what follows `name` in the first APP1 segment that begins with it, or None."""
    for segment in found:
        if segment.marker == APP1 and segment.begins_with(name, data):
            return data[segment.start + 4 + len(name) : segment.end]
    return None


PNG_START = b"\x89PNG\r\n\x1a\n"
# One chunk for each row of the longest image that is read, and as many again.
MAX_CHUNKS = 20_000


def check_chunks(data: bytes, work: DecodeWork) -> None:
    """Raise BadReference if a PNG has more chunks than any real one."""
    at, num_chunks = len(PNG_START), 0
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        num_chunks += 1
        if num_chunks > MAX_CHUNKS:
            raise work.exceeded()
