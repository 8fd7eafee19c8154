"""Make control images of photographs: their edges, or their depths.

This is for clients: `flux-ray generate --make-control` calls it. Servers take control images as
they are sent, and no server imports this file.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flux_ray.catalog import TOKEN_SIDE, scaled_size
from flux_ray.engine.images import encode_png, raster_for
from flux_ray.resizing import eight_bits, on_white

MAX_PIXELS = 1024 * 1024
# Those of BFL's own code for FLUX.1 Canny, of 255: an edge begins above the second, and goes on
# while it is above the first.
CANNY_THRESHOLDS = (50, 200)


def control_image(photo: Path, size: tuple[int, int] | None, depth_model: str | None) -> bytes:
    """Return a PNG file of a photograph's depths, or of its edges if there is no `depth_model`.

    `size`: width and height to scale the photograph to; None: its own, at most a megapixel, and
    whole tokens. `depth_model`: a model of transformers, as a folder or a name on the hub. Raise
    ValueError, with a sentence for the user, if something for it is missing.
    """
    image = fitted(opened(photo), size)
    made = edges_of(image) if depth_model is None else depths_of(image, depth_model)
    return encode_png(raster_for(made))


def opened(photo: Path) -> Image.Image:
    """Return the photograph upright, in RGB as a server would; raise ValueError if it is no image.

    Transparent parts are put on white: the colours under them are nothing that anybody sees.
    """
    try:
        with Image.open(photo) as image:
            return on_white(eight_bits(ImageOps.exif_transpose(image)))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{photo} is no image that can be read: {error}") from error


def fitted(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Scale a photograph to the size that is generated, which the server then keeps.

    Edges that are scaled afterwards become grey and broken.
    """
    if size is None:
        width, height = (
            max(TOKEN_SIDE, side // TOKEN_SIDE * TOKEN_SIDE)
            for side in scaled_size(*image.size, MAX_PIXELS)
        )
        size = width, height
    return image.resize(size, Image.Resampling.LANCZOS)


def edges_of(image: Image.Image) -> Image.Image:
    """Return white edges on black, as Canny's method finds them; ValueError without OpenCV."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError("canny needs OpenCV: pip install 'flux-ray[control]'") from error
    return Image.fromarray(cv2.Canny(np.asarray(image), *CANNY_THRESHOLDS))


def depths_of(image: Image.Image, model: str) -> Image.Image:
    """Return what is near white and what is far black; ValueError if the model cannot be loaded."""
    from transformers import pipeline

    try:
        estimate = pipeline("depth-estimation", model=model, device="cpu")
    except (OSError, ValueError) as error:
        raise ValueError(f"the depth model {model} cannot be loaded: {error}") from error
    depths: Image.Image = estimate(image)["depth"]
    return depths
