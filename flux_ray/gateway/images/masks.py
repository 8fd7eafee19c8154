"""Masks: untrusted bytes to the pixels that are to be drawn anew."""

from dataclasses import replace

from PIL import Image

from flux_ray.config.gateway import Limits
from flux_ray.errors import BadReference
from flux_ray.gateway.images.decode import counted, is_opaque, on_white, raster_from, read
from flux_ray.gateway.images.file_formats import DECODERS, FIRST
from flux_ray.gateway.memory_budget import MEMORY
from flux_ray.request import ImageRequest, Mask, RgbImage
from flux_ray.resizing import fit_image, fit_mask

MARK_TRANSPARENT = [255] + [0] * 255
MARK_LIGHT = [0] * 128 + [255] * 128
NOTHING = (
    "marks nothing to draw: its pixels must be fully transparent there,"
    " or white where none of it is transparent"
)


def decode_mask(data: bytes, limits: Limits, name: str) -> Mask:
    """The mask in `data`, if it marks anything; the same limits as for a reference."""
    mask = read(data, limits, name, mask_from)
    if 255 not in mask.marks:
        raise BadReference(f"{name} {NOTHING}", "mask")
    return counted_mask(mask, limits)


def decode_painted_mask(data: bytes, limits: Limits, name: str) -> Mask:
    """The mask in `data` by BFL's rule: white is drawn, also on a layer that else is transparent.

    Where nothing is white, but something is transparent, by OpenAI's.
    """
    mask = read(data, limits, name, painted_mask_from)
    if 255 not in mask.marks:
        raise BadReference(f"{name} {NOTHING}", "mask")
    return counted_mask(mask, limits)


def painted_mask_from(image: Image.Image) -> Mask:
    """What is transparent stays, as black does, if anything else is white."""
    if not image.has_transparency_data or is_opaque(image):
        return mask_from_luma(image)
    black = Image.new("RGBA", image.size, "black")
    mask = mask_from_luma(Image.alpha_composite(black, image.convert("RGBA")))
    return mask if 255 in mask.marks else mask_from_alpha(image)


def decode_with_alpha(data: bytes, limits: Limits, name: str) -> tuple[RgbImage, Mask]:
    """An image whose alpha channel is its mask."""
    raster, mask = decode_erased(data, limits, name)
    if mask is None:
        raise BadReference(f"mask is required, unless {name} is transparent somewhere", "mask")
    return raster, mask


def decode_erased(data: bytes, limits: Limits, name: str) -> tuple[RgbImage, Mask | None]:
    """An image, and the mask of its fully transparent pixels, if it has any."""
    rgb, mask = read(data, limits, name, lambda image: (on_white(image), mask_from_alpha(image)))
    return raster_from(rgb, limits), counted_mask(mask, limits) if 255 in mask.marks else None


def counted_mask(mask: Mask, limits: Limits) -> Mask:
    """The same, counted while somebody holds it. Overloaded."""
    return MEMORY.add(mask, len(mask.marks), limits.max_kept_bytes)


async def fitted(request: ImageRequest, limits: Limits) -> ImageRequest:
    """The request with its mask, and the image that it is of, in the size that is drawn.

    To the pixel what a rank makes of them. Overloaded.
    """
    if request.mask is None:
        return request
    return await DECODERS.run(FIRST, lambda: fit(request, limits))


def fit(request: ImageRequest, limits: Limits) -> ImageRequest:
    """Scale what has another size."""
    size, mask, (image, *others) = (
        (request.width, request.height),
        request.mask,
        request.references,
    )
    assert mask is not None, "nothing says what is drawn of it"
    if (image.width, image.height) != size:
        image = counted(fit_image(image, size), limits)
    if (mask.width, mask.height) != size:
        mask = counted_mask(fit_mask(mask, size), limits)
    return replace(request, references=(image, *others), mask=mask)


def mask_from(image: Image.Image) -> Mask:
    """By OpenAI's rule if any of it is transparent, else by that of everybody else.

    Clients that paint black and white on an opaque canvas send an alpha channel too.
    """
    if image.has_transparency_data and not is_opaque(image):
        return mask_from_alpha(image)
    return mask_from_luma(image)


def mask_from_alpha(image: Image.Image) -> Mask:
    """OpenAI's: fully transparent pixels are drawn anew."""
    alpha = image.convert("RGBA").getchannel("A")
    return Mask(image.width, image.height, alpha.point(MARK_TRANSPARENT).tobytes())


def mask_from_luma(image: Image.Image) -> Mask:
    """BFL's, and that of OpenAI's kin: white is drawn anew, black stays."""
    luma = on_white(image).convert("L")
    return Mask(image.width, image.height, luma.point(MARK_LIGHT).tobytes())
