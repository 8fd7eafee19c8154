"""Pixels: rasters to and from Pillow images, and to encoded bytes."""

import io

from PIL import Image

from flux_ray.request import Encoding, Raster


def image_for(raster: Raster) -> Image.Image:
    """The Pillow image of a raster."""
    return Image.frombytes("RGB", (raster.width, raster.height), raster.rgb)


def raster_for(image: Image.Image) -> Raster:
    """The raster of an RGB Pillow image."""
    return Raster(image.width, image.height, image.convert("RGB").tobytes())


def encode_picture(raster: Raster, encoding: Encoding) -> bytes:
    """The raster as a png, jpeg or webp file."""
    buffer = io.BytesIO()
    options = {} if encoding.format == "png" else {"quality": encoding.quality}
    image_for(raster).save(buffer, format=encoding.format, **options)
    return buffer.getvalue()
