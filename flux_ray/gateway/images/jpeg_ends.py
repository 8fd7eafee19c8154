"""JPEG files without their last bytes, which every viewer shows and Pillow refuses."""

import zlib

from PIL import Image

from flux_ray.gateway.images.decode_work import DecodeWork

END = b"\xff\xd9"
# Read as pixels these are none that zeros would be, with which libjpeg fills what is missing.
FILLER = b"\x5a\xa5\x3c\xc3" * 64


def with_its_end(data: bytes, work: DecodeWork) -> Image.Image | None:
    """Return the decoded image of the file, if nothing but its end is missing; else None.

    Raises what Pillow raises where it is broken otherwise, and BadReference.
    """
    data = data.rstrip(b"\xff")
    filled = pixel_sum(work.open(data + FILLER + END))
    image = work.open(data + END)
    # Where pixels are missing, what stands in their place shows.
    return image if pixel_sum(image) == filled else None


def pixel_sum(image: Image.Image) -> int:
    """Return a checksum of its pixels, which are decoded now."""
    return zlib.crc32(image.tobytes())
