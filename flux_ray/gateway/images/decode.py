"""Reference images: untrusted bytes to checked, upright RGB pixels."""

import struct
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from flux_ray.config.gateway import Limits
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
from flux_ray.resizing import scale_down

Read = TypeVar("Read")

# The image processor of the FLUX.2 pipelines refuses smaller and longer ones.
MIN_SIDE = 64
MAX_ASPECT = 8
# What Pillow's readers raise on broken files; its own words may show our insides.
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

# Of MAX_WORK_BYTES, which a pixel takes at most while it is decoded, as measured: the image, and
# copies on the way to upright RGB. WebP is decoded in one piece before that; what is transparent is
# composed.
WORK_BYTES, WEBP_BYTES, TRANSPARENT_BYTES = 18, 8, 12
# Of a lossless WebP's first pixels: its codes, up to 65,536 sets of 5.5 kB, each for 16 pixels or
# more, though they take 4 bytes of the file.
CODES_BYTES, MAX_CODED_PIXELS, LOSSLESS_MARKS = 344, 16 * 65_536, (b"VP8L", b"ALPH")
# The colours in sRGB, and what is transparent beside them.
PROFILE_BYTES = 8
# What a photograph of four megapixels takes, and a tenth of a second of a processor.
LARGE_WORK_BYTES = 4 * 2**20 * (WORK_BYTES + PROFILE_BYTES)

# read() checks the size itself, before any pixel is decoded; Pillow would only warn.
Image.MAX_IMAGE_PIXELS = None


class SentImage(NamedTuple):
    """A reference: its size as it was sent, and its pixels by the most that a tier takes."""

    width: int
    height: int
    rasters: Mapping[int, RgbImage]

    def raster_for(self, max_pixels: int) -> RgbImage:
        """As a tier takes it that scales references down to so many pixels."""
        return self.rasters[max_pixels]


class Opened(NamedTuple):
    """An image that is not decoded yet, what of its file is a plain JPEG, and what it may cost."""

    image: Image.Image
    jpeg: PlainJpeg | None
    work: DecodeWork


def decode(data: bytes, limits: Limits, name: str) -> RgbImage:
    """The image in `data`; errors call it by `name`, never by the client's file name.

    Overloaded if this gateway holds as many bytes as it may.
    """
    return raster_from(read(data, limits, name, to_rgb), limits)


def decode_reference(
    data: bytes, limits: Limits, name: str, max_pixels: Collection[int]
) -> SentImage:
    """The same, scaled down to each of these numbers of pixels as a rank would do it."""
    return read(
        data, limits, name, lambda image: sent_image_from(to_rgb(image), limits, max_pixels)
    )


def sent_image_from(rgb: Image.Image, limits: Limits, max_pixels: Collection[int]) -> SentImage:
    """The image scaled to each limit; limits of one size share the pixels."""
    scaled = {limit: scaled_reference(rgb, limit) for limit in max_pixels}
    rasters = {image.size: raster_from(image, limits) for image in scaled.values()}
    return SentImage(*rgb.size, {limit: rasters[image.size] for limit, image in scaled.items()})


def scaled_reference(rgb: Image.Image, max_pixels: int) -> Image.Image:
    """The image within the limit; as it is where whole pixels would make it longer than may be."""
    scaled = scale_down(rgb, max_pixels)
    return rgb if is_too_small(scaled.size) or is_too_long(scaled.size) else scaled


def whole_image(raster: RgbImage, max_pixels: Collection[int]) -> SentImage:
    """Of an image under a mask: the size that is drawn will say how it is scaled."""
    return SentImage(raster.width, raster.height, dict.fromkeys(max_pixels, raster))


def raster_from(rgb: Image.Image, limits: Limits) -> RgbImage:
    """The pixels, counted while somebody holds them. Overloaded."""
    return counted(RgbImage(rgb.width, rgb.height, rgb.tobytes()), limits)


def counted(raster: RgbImage, limits: Limits) -> RgbImage:
    """The same, counted while somebody holds it, with its digest. Overloaded."""
    # Known from now on: later it would hold the event loop.
    _ = raster.digest
    return MEMORY.add(raster, len(raster.rgb), limits.max_kept_bytes)


def is_large(data: bytes, limits: Limits, name: str) -> bool:
    """Whether decoding it takes long, by what its head says. Raises BadReference."""
    image, _, _ = opened(data, limits, name)
    return work_bytes(image, data) > LARGE_WORK_BYTES


def read(data: bytes, limits: Limits, name: str, convert: Callable[[Image.Image], Read]) -> Read:
    """What is made of the image, upright; it is measured before it is decoded.

    Raises BadReference, also where decoding takes more work than it may.
    """
    image, jpeg, work = opened(data, limits, name)
    with MEMORY.working(work_bytes(image, data), limits.max_work_bytes):
        try:
            return convert(upright(completed(image, jpeg, work)))
        except BROKEN:
            raise BadReference(f"{name} is damaged", "image") from None


def opened(data: bytes, limits: Limits, name: str) -> Opened:
    """The image with nothing but its head read, which takes no time. Raises BadReference."""
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
    """Raise BadReference for what no model takes, or this gateway does not."""
    width, height = size
    if width * height > limits.max_image_pixels:
        raise BadReference(f"{name} has more than {limits.max_image_pixels} pixels", "image")
    if is_too_small(size):
        raise BadReference(f"{name} is smaller than {MIN_SIDE} pixels on a side", "image")
    if is_too_long(size):
        raise BadReference(f"{name} is more than {MAX_ASPECT} times as long as wide", "image")


def is_too_small(size: tuple[int, int]) -> bool:
    """Whether the model would refuse it for that."""
    return min(size) < MIN_SIDE


def is_too_long(size: tuple[int, int]) -> bool:
    """Whether the model would refuse it for that."""
    return max(size) > MAX_ASPECT * min(size)


def work_bytes(image: Image.Image, data: bytes) -> int:
    """What decoding takes, by what the file's header says."""
    each = WORK_BYTES + (WEBP_BYTES if image.format == "WEBP" else 0)
    each += TRANSPARENT_BYTES if image.has_transparency_data else 0
    each += PROFILE_BYTES if image.info.get("icc_profile") else 0
    num_pixels = image.width * image.height
    if image.format == "WEBP" and any(mark in data for mark in LOSSLESS_MARKS):
        return num_pixels * each + min(num_pixels, MAX_CODED_PIXELS) * CODES_BYTES
    return num_pixels * each


def completed(image: Image.Image, jpeg: PlainJpeg | None, work: DecodeWork) -> Image.Image:
    """Decode it; if its file lacks nothing but its end, that is no damage."""
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
    """Return it as viewers show it: upright, 8 bits a channel, in sRGB."""
    profile = image.info.get("icc_profile")
    turn_upright(image)
    return to_srgb(eight_bits(image), profile)


def eight_bits(image: Image.Image) -> Image.Image:
    """8 bits a channel: Pillow would clip 16-bit grey to 255 instead of scaling it."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """As on_white; the caller is told where that shows."""
    if image.has_transparency_data and not is_opaque(image):
        note("its transparent parts were put on white")
    return on_white(image)


def is_opaque(image: Image.Image) -> bool:
    """Whether all of it is."""
    least, _ = image.convert("RGBA").getchannel("A").getextrema()
    return least == 255


def on_white(image: Image.Image) -> Image.Image:
    """Transparent parts over white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
