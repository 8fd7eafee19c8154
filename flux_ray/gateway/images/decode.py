"""Decode reference images: untrusted bytes to checked, upright RGB pixels.

`decode` and `decode_reference` are called on the threads of `DECODERS`. The head of a file is
checked before any pixel is decoded, working memory is reserved in the budget, and processor time is
limited by `DecodeWork`.
"""

import struct
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeVar

from PIL import Image

from flux_ray.catalog import ReferenceLimit
from flux_ray.config import Limits
from flux_ray.errors import BadReference
from flux_ray.gateway.images.file_formats import (
    JPEG_START,
    PNG_START,
    DecodeWork,
    PlainJpeg,
    check_chunks,
    plain_jpeg,
    with_its_end,
)
from flux_ray.gateway.images.normalize import note, to_srgb, turn_upright
from flux_ray.gateway.memory_budget import MEMORY
from flux_ray.request import RgbImage
from flux_ray.resizing import eight_bits, on_white, scale_down

Read = TypeVar("Read")

# The image processor of the FLUX.2 pipelines refuses smaller images and longer ones.
MIN_SIDE = 64
MAX_ASPECT = 8
# What Pillow's readers raise on broken files. Their own texts may show our internals, so callers
# get another one.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)

# Bytes that a pixel takes at most while it is decoded, as measured: the image, and copies on the
# way to upright RGB. WebP is also decoded in one piece before that, and transparent images are
# composed. With PROFILE_BYTES they add up to MAX_WORK_BYTES in config/gateway.py.
WORK_BYTES, WEBP_BYTES, TRANSPARENT_BYTES = 18, 8, 12
# Lossless WebP: its Huffman codes, up to 65,536 sets of 5.5 kB, each for 16 pixels or more. A set
# may take only 4 bytes of the file, so the file's size says nothing about them.
CODES_BYTES, MAX_CODED_PIXELS, LOSSLESS_MARKS = 344, 16 * 65_536, (b"VP8L", b"ALPH")
# For images with a colour profile: the colours in sRGB, and transparency beside them.
PROFILE_BYTES = 8
# Above this an image is large: a photograph of 4 megapixels, or a tenth of a second of a processor.
LARGE_WORK_BYTES = 4 * 2**20 * (WORK_BYTES + PROFILE_BYTES)

# `opened` checks the size itself before any pixel is decoded; Pillow would only warn.
Image.MAX_IMAGE_PIXELS = None


class SentImage(NamedTuple):
    """A decoded reference: its size as sent, and its pixels scaled for each tier's limit."""

    width: int
    height: int
    rasters: Mapping[ReferenceLimit, RgbImage]

    def raster_for(self, limit: ReferenceLimit) -> RgbImage:
        """Return the image as scaled for a tier with that limit of references."""
        return self.rasters[limit]


class Opened(NamedTuple):
    """An image that is not decoded yet, its plain JPEG if it is one, and the limit of its work."""

    image: Image.Image
    jpeg: PlainJpeg | None
    work: DecodeWork


def decode(data: bytes, limits: Limits, name: str) -> RgbImage:
    """Return the image in `data`; errors call it `name`, never by the client's file name.

    Raise BadReference, or Overloaded if the gateway's memory budget is full.
    """
    return raster_from(read(data, limits, name, to_rgb), limits)


def decode_reference(
    data: bytes, limits: Limits, name: str, scales: Collection[ReferenceLimit]
) -> SentImage:
    """Return the image scaled to each of `scales`, exactly as a rank would scale it."""
    return read(data, limits, name, lambda image: sent_image_from(to_rgb(image), limits, scales))


def sent_image_from(
    rgb: Image.Image, limits: Limits, scales: Collection[ReferenceLimit]
) -> SentImage:
    """Return the image scaled to each of `scales`; those that lead to one size share the pixels."""
    scaled = {limit: scaled_reference(rgb, limit) for limit in scales}
    rasters = {image.size: raster_from(image, limits) for image in scaled.values()}
    return SentImage(*rgb.size, {limit: rasters[image.size] for limit, image in scaled.items()})


def scaled_reference(rgb: Image.Image, limit: ReferenceLimit) -> Image.Image:
    """Return the image scaled to the limit.

    Return it unchanged if rounding to whole pixels made it too small or too long for the model.
    """
    scaled = scale_down(rgb, limit)
    return rgb if is_too_small(scaled.size) or is_too_long(scaled.size) else scaled


def whole_image(raster: RgbImage, scales: Collection[ReferenceLimit]) -> SentImage:
    """Return an image under a mask, unscaled: it is later scaled to the size that is generated."""
    return SentImage(raster.width, raster.height, dict.fromkeys(scales, raster))


def raster_from(rgb: Image.Image, limits: Limits) -> RgbImage:
    """Return the pixels, counted in the memory budget while anybody holds them. Overloaded."""
    return counted(RgbImage(rgb.width, rgb.height, rgb.tobytes()), limits)


def counted(raster: RgbImage, limits: Limits) -> RgbImage:
    """Return the image with its digest computed, counted in the memory budget. Overloaded."""
    # Computed here, on a thread; later it would block the event loop.
    _ = raster.digest
    return MEMORY.add(raster, len(raster.rgb), limits.max_kept_bytes)


def is_large(data: bytes, limits: Limits, name: str) -> bool:
    """Return whether decoding takes long, judging by the file's head. Raise BadReference."""
    image, _, _ = opened(data, limits, name)
    return work_bytes(image, data) > LARGE_WORK_BYTES


def read(data: bytes, limits: Limits, name: str, convert: Callable[[Image.Image], Read]) -> Read:
    """Return what `convert` makes of the upright image.

    Raise BadReference for a bad or damaged image, or one whose decoding takes too much work.
    """
    image, jpeg, work = opened(data, limits, name)
    with MEMORY.working(work_bytes(image, data), limits.max_work_bytes):
        try:
            return convert(upright(completed(image, jpeg, work)))
        except BROKEN:
            raise BadReference(f"{name} is damaged", "image") from None


def opened(data: bytes, limits: Limits, name: str) -> Opened:
    """Return the image with only its head read, which takes no time. Raise BadReference."""
    if len(data) > limits.max_image_bytes:
        raise BadReference(f"{name} is larger than {limits.max_image_bytes} bytes", "image")
    work = DecodeWork(limits.max_decode_s, name)
    jpeg = plain_jpeg(data, work) if data.startswith(JPEG_START) else None
    if data.startswith(PNG_START):
        check_chunks(data, work)
    try:
        image = work.open(data if jpeg is None else jpeg.data)
    except BROKEN:
        raise BadReference(f"{name} is not a PNG, JPEG or WebP image", "image") from None
    check_size(image.size, limits, name)
    if jpeg is not None and jpeg.is_costly(image.width * image.height, limits.max_image_pixels):
        raise work.exceeded()
    return Opened(image, jpeg, work)


def check_size(size: tuple[int, int], limits: Limits, name: str) -> None:
    """Raise BadReference if this gateway, or every model, refuses an image of that size."""
    width, height = size
    if width * height > limits.max_image_pixels:
        raise BadReference(f"{name} has more than {limits.max_image_pixels} pixels", "image")
    if is_too_small(size):
        raise BadReference(f"{name} is smaller than {MIN_SIDE} pixels on a side", "image")
    if is_too_long(size):
        raise BadReference(f"{name} is more than {MAX_ASPECT} times as long as wide", "image")


def is_too_small(size: tuple[int, int]) -> bool:
    """Return whether the model would refuse the size as too small."""
    return min(size) < MIN_SIDE


def is_too_long(size: tuple[int, int]) -> bool:
    """Return whether the model would refuse the size as too long."""
    return max(size) > MAX_ASPECT * min(size)


def work_bytes(image: Image.Image, data: bytes) -> int:
    """Return the memory that decoding takes, judging by the file's header."""
    each = WORK_BYTES + (WEBP_BYTES if image.format == "WEBP" else 0)
    each += TRANSPARENT_BYTES if image.has_transparency_data else 0
    each += PROFILE_BYTES if image.info.get("icc_profile") else 0
    num_pixels = image.width * image.height
    if image.format == "WEBP" and any(mark in data for mark in LOSSLESS_MARKS):
        return num_pixels * each + min(num_pixels, MAX_CODED_PIXELS) * CODES_BYTES
    return num_pixels * each


def completed(image: Image.Image, jpeg: PlainJpeg | None, work: DecodeWork) -> Image.Image:
    """Return the decoded image; a file that lacks only its end marker is accepted."""
    try:
        image.load()
    except BROKEN:
        whole = with_its_end(jpeg.data, work) if jpeg is not None else None
        if whole is None:
            raise
        note("the end of its file is missing, but none of its pixels")
        image = whole
    if jpeg is not None:
        image.info.update(jpeg.metadata())
    return image


def upright(image: Image.Image) -> Image.Image:
    """Return the image as viewers show it: upright, 8 bits a channel, in sRGB."""
    profile = image.info.get("icc_profile")
    turn_upright(image)
    return to_srgb(eight_bits(image), profile)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image over white; note for the caller that its transparent parts were filled."""
    if image.has_transparency_data and not is_opaque(image):
        note("its transparent parts were put on white")
    return on_white(image)


def is_opaque(image: Image.Image) -> bool:
    """Return whether no pixel of the image is transparent."""
    least, _ = image.convert("RGBA").getchannel("A").getextrema()
    return least == 255
