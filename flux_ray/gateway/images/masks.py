"""Decode masks: untrusted bytes to the pixels that are to be generated again.

There are two rules. OpenAI's is that fully transparent pixels are generated again; everybody
else's, BFL's among them, is that white ones are.
"""

from dataclasses import replace

from PIL import Image

from flux_ray.config import Limits
from flux_ray.errors import BadReference
from flux_ray.gateway.images.decode import counted, is_opaque, raster_from, read
from flux_ray.gateway.images.file_formats import DECODERS, FIRST
from flux_ray.gateway.memory_budget import MEMORY
from flux_ray.request import ImageRequest, Mask, RgbImage
from flux_ray.resizing import fit_image, fit_mask, on_white

# Tables for Pillow's `point`: which of the values 0 to 255 mark a pixel.
MARK_TRANSPARENT = [255] + [0] * 255
MARK_LIGHT = [0] * 128 + [255] * 128
NOTHING = (
    "marks nothing to draw: its pixels must be fully transparent there,"
    " or white where none of it is transparent"
)


def decode_mask(data: bytes, limits: Limits, name: str) -> Mask:
    """Return the mask in `data`, with a reference's limits. BadReference if it marks nothing."""
    mask = read(data, limits, name, mask_from)
    if 255 not in mask.marks:
        raise BadReference(f"{name} {NOTHING}", "mask")
    return counted_mask(mask, limits)


def decode_painted_mask(data: bytes, limits: Limits, name: str) -> Mask:
    """Return the mask in `data` by BFL's rule: white is generated again, and black is kept.

    White counts also on a layer that is transparent elsewhere. If nothing is white but something is
    transparent, OpenAI's rule applies. Raise BadReference if it marks nothing.
    """
    mask = read(data, limits, name, painted_mask_from)
    if 255 not in mask.marks:
        raise BadReference(f"{name} {NOTHING}", "mask")
    return counted_mask(mask, limits)


def painted_mask_from(image: Image.Image) -> Mask:
    """Return the mask by BFL's rule: transparent parts stay if anything else is white."""
    if not image.has_transparency_data or is_opaque(image):
        return mask_from_luma(image)
    # Over black, so that what is transparent is not taken for white.
    black = Image.new("RGBA", image.size, "black")
    mask = mask_from_luma(Image.alpha_composite(black, image.convert("RGBA")))
    return mask if 255 in mask.marks else mask_from_alpha(image)


def decode_with_alpha(data: bytes, limits: Limits, name: str) -> tuple[RgbImage, Mask]:
    """Return an image and the mask in its alpha channel. Raise BadReference if it has none."""
    raster, mask = decode_erased(data, limits, name)
    if mask is None:
        raise BadReference(f"mask is required, unless {name} is transparent somewhere", "mask")
    return raster, mask


def decode_erased(data: bytes, limits: Limits, name: str) -> tuple[RgbImage, Mask | None]:
    """Return an image, and the mask of its fully transparent pixels, if it has any."""
    rgb, mask = read(data, limits, name, lambda image: (on_white(image), mask_from_alpha(image)))
    return raster_from(rgb, limits), counted_mask(mask, limits) if 255 in mask.marks else None


def counted_mask(mask: Mask, limits: Limits) -> Mask:
    """Return the mask, counted in the memory budget while anybody holds it. Overloaded."""
    return MEMORY.add(mask, len(mask.marks), limits.max_kept_bytes)


async def fitted(request: ImageRequest, limits: Limits) -> ImageRequest:
    """Return the request with an image under a mask, or a control image, in its own size.

    A rank would scale them to the same pixels. Raise Overloaded.
    """
    if not request.fits_reference:
        return request
    # Before images that are still to be decoded, as this request needs nothing else any more.
    return await DECODERS.run(FIRST, lambda: fit(request, limits))


def fit(request: ImageRequest, limits: Limits) -> ImageRequest:
    """Return the request with first image and mask scaled, where they have another size."""
    size, mask = (request.width, request.height), request.mask
    image, *others = request.references
    if (image.width, image.height) != size:
        image = counted(fit_image(image, size), limits)
    if mask is not None and (mask.width, mask.height) != size:
        mask = counted_mask(fit_mask(mask, size), limits)
    return replace(request, references=(image, *others), mask=mask)


def mask_from(image: Image.Image) -> Mask:
    """Return the mask by OpenAI's rule if any of it is transparent, else by everybody else's.

    Clients that paint black and white on an opaque canvas send an alpha channel, too.
    """
    if image.has_transparency_data and not is_opaque(image):
        return mask_from_alpha(image)
    return mask_from_luma(image)


def mask_from_alpha(image: Image.Image) -> Mask:
    """Return a mask by OpenAI's rule: fully transparent pixels are generated again."""
    alpha = image.convert("RGBA").getchannel("A")
    return Mask(image.width, image.height, alpha.point(MARK_TRANSPARENT).tobytes())


def mask_from_luma(image: Image.Image) -> Mask:
    """Return a mask by BFL's rule: light pixels are generated again, dark ones stay."""
    luma = on_white(image).convert("L")
    return Mask(image.width, image.height, luma.point(MARK_LIGHT).tobytes())
