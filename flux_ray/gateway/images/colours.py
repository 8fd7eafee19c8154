"""Colours as people see them: images with a colour profile of their own to sRGB."""

import io

import numpy as np
from PIL import Image, ImageCms

from flux_ray.gateway.images.notes import note

SRGB = ImageCms.createProfile("sRGB")
# What cannot be seen: a profile that changes no colour by more is sRGB under another name.
SAME = 2
# Those of presses have some 3 MB.
MAX_PROFILE_BYTES = 4 * 2**20
# Elements in any number, of up to 15 channels each: minutes a profile, which nobody can stop.
COSTLY_TYPE = b"mpet"
IGNORED = "its colour profile cannot be used and was ignored"
BROKEN = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the image in sRGB; a profile that is broken, costly, or of another kind is ignored.

    The model has seen sRGB only, and what it generates is taken for sRGB.
    """
    if not profile:
        return image
    if is_costly(profile):
        note(IGNORED)
        return image
    plain, alpha = without_alpha(image)
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            SRGB,
            plain.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if changes_nothing(transform, plain.mode):
            return image
        converted = ImageCms.applyTransform(plain, transform)
    except BROKEN:
        note(IGNORED)
        return image
    assert converted is not None, "not in place"
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def is_costly(profile: bytes) -> bool:
    """Say whether the colours of a few pixels may take as long as it likes."""
    return len(profile) > MAX_PROFILE_BYTES or COSTLY_TYPE in profile


def without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in a mode that a profile may be of, and the alpha channel if any."""
    if image.has_transparency_data:
        whole = image.convert("LA" if image.mode in ("LA", "L") else "RGBA")
        return whole.convert("L" if whole.mode == "LA" else "RGB"), whole.getchannel("A")
    if image.mode in ("RGB", "CMYK", "L"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Say whether the colours of an image in that mode would stay what they are."""
    if mode != "RGB":
        return False
    steps = np.arange(0, 256, 51, dtype=np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, len(steps), 3)
    seen = ImageCms.applyTransform(Image.fromarray(cube), transform)
    difference = np.asarray(seen).astype(int) - cube
    return int(np.abs(difference).max()) <= SAME
