"""Reference pictures: untrusted bytes to checked, upright RGB pixels."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from flux_ray.errors import BadReference
from flux_ray.gateway.colours import to_srgb
from flux_ray.gateway.held import HELD
from flux_ray.gateway.image_notes import note
from flux_ray.gateway.jpeg_ends import with_its_end
from flux_ray.gateway_config import Limits
from flux_ray.request import Raster

Read = TypeVar("Read")

FORMATS = ("PNG", "JPEG", "WEBP")
# Several in one file are opened as the second.
JPEGS = ("JPEG", "MPO")
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

# read() checks the size itself, before any pixel is decoded; Pillow would only warn.
Image.MAX_IMAGE_PIXELS = None


def decode(data: bytes, limits: Limits, name: str) -> Raster:
    """The picture in `data`; errors call it by `name`, never by the client's file name.

    Overloaded if this gateway holds as many as it may.
    """
    return raster_from(read(data, limits, name, to_rgb), limits)


def raster_from(rgb: Image.Image, limits: Limits) -> Raster:
    """The pixels, counted while somebody holds them. Overloaded."""
    raster = Raster(rgb.width, rgb.height, rgb.tobytes())
    HELD.add(raster, limits.max_held_bytes)
    # Known from now on: later it would hold the event loop.
    _ = raster.digest
    return raster


def read(data: bytes, limits: Limits, name: str, convert: Callable[[Image.Image], Read]) -> Read:
    """What is made of the picture, upright; it is measured before it is decoded."""
    if len(data) > limits.max_image_bytes:
        raise BadReference(f"{name} is larger than {limits.max_image_bytes} bytes", "image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except BROKEN:
        raise BadReference(f"{name} is not a PNG, JPEG or WebP picture", "image") from None
    if image.width * image.height > limits.max_image_pixels:
        raise BadReference(f"{name} has more than {limits.max_image_pixels} pixels", "image")
    if min(image.size) < MIN_SIDE:
        raise BadReference(f"{name} is smaller than {MIN_SIDE} pixels on a side", "image")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadReference(f"{name} is more than {MAX_ASPECT} times as long as wide", "image")
    try:
        return convert(upright(completed(image, data)))
    except BROKEN:
        raise BadReference(f"{name} is damaged", "image") from None


def completed(image: Image.Image, data: bytes) -> Image.Image:
    """Decode it; if its file lacks nothing but its end, that is no damage."""
    try:
        image.load()
    except BROKEN:
        whole = with_its_end(data) if image.format in JPEGS else None
        if whole is None:
            raise
        note("the end of its file is missing, but none of its pixels")
        return Image.open(io.BytesIO(whole), formats=FORMATS)
    return image


def upright(image: Image.Image) -> Image.Image:
    """Return it as viewers show it: upright, 8 bits a channel, in sRGB."""
    turned = ImageOps.exif_transpose(image)
    return to_srgb(eight_bits(turned), image.info.get("icc_profile"))


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
