"""Scale references and masks to what a tier takes. The gateway does it early, ranks what is left.

Both call Pillow in the same way, so that an image does not depend on who scaled its references.
"""

import numpy as np
from PIL import Image

from flux_ray.catalog.flops import scaled_size
from flux_ray.request import Mask, RgbImage

# Of 255: where a scaled mask's edge is.
THRESHOLD = 128


def scale_down(image: Image.Image, max_pixels: int) -> Image.Image:
    """Scale an RGB image to a tier's limit, as Flux2ImageProcessor does; smaller ones are as is."""
    size = scaled_size(*image.size, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def fit_image(raster: RgbImage, size: tuple[int, int]) -> RgbImage:
    """The image in the size drawn; to the pixel what it was if it had that size."""
    if (raster.width, raster.height) == size:
        return raster
    image = Image.frombytes("RGB", (raster.width, raster.height), raster.rgb)
    return RgbImage(*size, image.resize(size, Image.Resampling.LANCZOS).tobytes())


def fit_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """The mask, scaled as its image is; specks that would be lost are pixels, if all would be."""
    if (mask.width, mask.height) == size:
        return mask
    scaled = mask_image(mask).resize(size, Image.Resampling.LANCZOS)
    marks = scaled.point([255 * (value >= THRESHOLD) for value in range(256)]).tobytes()
    return Mask(*size, marks if 255 in marks else specks(mask, size))


def specks(mask: Mask, size: tuple[int, int]) -> bytes:
    """The marks of every scaled pixel that a mark falls into."""
    width, height = size
    rows, columns = np.nonzero(np.asarray(mask_image(mask)))
    marks = np.zeros((height, width), np.uint8)
    marks[rows * height // mask.height, columns * width // mask.width] = 255
    return marks.tobytes()


def mask_image(mask: Mask) -> Image.Image:
    """As a grey image, white where to draw."""
    return Image.frombytes("L", (mask.width, mask.height), mask.marks)
