"""Bring references and masks to what a tier takes: 8 bits a channel, over white, scaled.

The gateway scales early, and the ranks scale what is left. Both use these functions, so that an
image does not depend on which of them scaled its references; clients that make control images read
photographs by them too.
"""

import numpy as np
from PIL import Image

from flux_ray.catalog import ReferenceLimit, limited_size
from flux_ray.request import Mask, RgbImage

# Pixels of a scaled mask from this value on, of 255, count as marked.
THRESHOLD = 128


def eight_bits(image: Image.Image) -> Image.Image:
    """Return 8 bits a channel. Pillow itself would clip 16-bit grey to 255, not scale it."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB, its transparent parts over white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def scale_down(image: Image.Image, limit: ReferenceLimit) -> Image.Image:
    """Scale an RGB image down to a tier's limit, as diffusers' processors do, unless it fits."""
    size = limited_size(*image.size, limit)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def fit_image(raster: RgbImage, size: tuple[int, int]) -> RgbImage:
    """Scale an image to the size that is generated; return it unchanged if it has that size."""
    if (raster.width, raster.height) == size:
        return raster
    image = Image.frombytes("RGB", (raster.width, raster.height), raster.rgb)
    return RgbImage(*size, image.resize(size, Image.Resampling.LANCZOS).tobytes())


def fit_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Scale a mask as its image is scaled.

    If every mark is so small that scaling would lose it, each becomes one pixel instead: an edit
    must not be left without anything to generate.
    """
    if (mask.width, mask.height) == size:
        return mask
    scaled = mask_image(mask).resize(size, Image.Resampling.LANCZOS)
    marks = scaled.point([255 * (value >= THRESHOLD) for value in range(256)]).tobytes()
    return Mask(*size, marks if 255 in marks else specks(mask, size))


def specks(mask: Mask, size: tuple[int, int]) -> bytes:
    """Return scaled marks in which every pixel is marked that any mark falls into."""
    width, height = size
    rows, columns = np.nonzero(np.asarray(mask_image(mask)))
    marks = np.zeros((height, width), np.uint8)
    marks[rows * height // mask.height, columns * width // mask.width] = 255
    return marks.tobytes()


def mask_image(mask: Mask) -> Image.Image:
    """Return the mask as a grey image, white where pixels are generated."""
    return Image.frombytes("L", (mask.width, mask.height), mask.marks)
