"""Pixels: rasters to and from Pillow images, and to encoded bytes."""

import io

from PIL import Image

from flux_ray.engine.png import encode_png
from flux_ray.request import Encoding, RgbImage


def image_for(raster: RgbImage) -> Image.Image:
    """The Pillow image of a raster."""
    return Image.frombytes("RGB", (raster.width, raster.height), raster.rgb)


def raster_for(image: Image.Image) -> RgbImage:
    """The raster of an RGB Pillow image."""
    return RgbImage(image.width, image.height, image.convert("RGB").tobytes())


def scaled(raster: RgbImage, size: tuple[int, int]) -> RgbImage:
    """Return the raster with this width and height."""
    return raster_for(image_for(raster).resize(size, Image.Resampling.LANCZOS))


def encode_picture(raster: RgbImage, encoding: Encoding) -> bytes:
    """The raster as a png, jpeg or webp file, scaled to the size that is asked for."""
    size = encoding.scaled_to
    if size is not None and size != (raster.width, raster.height):
        raster = scaled(raster, size)
    if encoding.format == "png":
        return encode_png(raster)
    buffer = io.BytesIO()
    image_for(raster).save(buffer, format=encoding.format, quality=encoding.quality)
    return buffer.getvalue()
