"""Decide the size of an image: parse what was asked, check it against the tier, and fit it.

A tier with `scales_sizes` accepts sizes that it does not generate: another size is generated and
scaled to the one asked for.
"""

import math
import re
from collections.abc import Sequence

from flux_ray.catalog import Canvas, Tier
from flux_ray.errors import BadRequest
from flux_ray.gateway.images.decode import SentImage
from flux_ray.request import ImageRequest

# Limits of sizes that an image is scaled to, those of BFL's API.
MIN_SCALED_SIDE = 16
MAX_SCALED_SIDE = 4096
MAX_SCALED_PIXELS = 4 * 1024 * 1024
MAX_SCALED_RATIO = 4
# Weighs shape against area: a shape that is off by 1/30 is as bad as twice the area, or half of it.
SHAPE_WEIGHT = 20.0


def check_scaled(width: int, height: int, tier: Tier, fields: tuple[str, str]) -> None:
    """Raise BadRequest unless an image may be scaled to that size."""
    for side, field in zip((width, height), fields, strict=True):
        if not MIN_SCALED_SIDE <= side <= MAX_SCALED_SIDE:
            message = f"width and height must be {MIN_SCALED_SIDE} to {MAX_SCALED_SIDE}"
            raise BadRequest(f"{message} on {tier.name}", field)
    if width * height > MAX_SCALED_PIXELS:
        message = f"width x height must be at most {MAX_SCALED_PIXELS} pixels on {tier.name}"
        raise BadRequest(message, fields[0])
    if max(width, height) > MAX_SCALED_RATIO * min(width, height):
        message = f"one side must be at most {MAX_SCALED_RATIO} times the other on {tier.name}"
        raise BadRequest(message, fields[0])


def generated_size(width: int, height: int, tier: Tier) -> tuple[int, int]:
    """Return the size to generate for an image of that size; it is scaled if they differ."""
    if not tier.scales_sizes or generates(width, height, tier):
        return width, height
    sides = range(tier.min_side, tier.max_side + 1, tier.size_multiple)
    sizes = [(w, h) for w in sides for h in sides if generates(w, h, tier)]
    area = tier.default_side**2

    def badness(size: tuple[int, int]) -> float:
        # In logarithms, so that twice as large is as bad as half as large.
        shape = abs(math.log(size[0] / size[1] * height / width))
        return SHAPE_WEIGHT * shape + abs(math.log(size[0] * size[1] / area))

    return min(sizes, key=badness)


def generates(width: int, height: int, tier: Tier) -> bool:
    """Return whether the tier generates that size without scaling."""
    sides = (width, height)
    return (
        all(tier.min_side <= side <= tier.max_side for side in sides)
        and not any(side % tier.size_multiple for side in sides)
        and width * height <= tier.max_pixels
    )


def size_notes(request: ImageRequest) -> list[str]:
    """Return a note for the caller if its images were scaled, else none."""
    if request.encoding.scaled_to is None:
        return []
    asked = "{}x{}".format(*request.encoding.scaled_to)
    generated = f"{request.width}x{request.height}"
    return [f"{request.tier} generates {generated} best: the image was scaled from that to {asked}"]


# BFL's documented range of aspect ratios: 1:4 to 4:1.
MAX_RATIO = 4.0
_RATIO = re.compile(r"([1-9][0-9]{0,4}):([1-9][0-9]{0,4})", re.A)
# `2k`: a side in units of 1024 pixels; `768sq`: a side in pixels; `1.5mp`: an area in megapixels.
_RESOLUTION = re.compile(
    r"(?P<k>[0-9]{1,2}(\.[0-9]{1,2})?)k|(?P<side>[0-9]{2,5})sq|(?P<mp>[0-9]{1,3}(\.[0-9]{1,3})?)mp"
)
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def parse_size(size: str, field: str = "size") -> tuple[int, int]:
    """Return width and height of `512x768`; `field` is the caller's name of it in errors."""
    match = _SIZE.fullmatch(size)
    if match is None:
        raise BadRequest(f"{field} must be `auto` or WIDTHxHEIGHT, like 512x768", field)
    return int(match[1]), int(match[2])


def check_size(width: int, height: int, tier: Tier, fields: tuple[str, str]) -> None:
    """Raise BadRequest unless the tier offers that size; `fields` name where each side was sent."""
    if tier.scales_sizes:
        check_scaled(width, height, tier, fields)
        return
    multiple = tier.size_multiple
    for side, field in zip((width, height), fields, strict=True):
        if side % multiple:
            raise BadRequest(f"width and height must be multiples of {multiple}", field)
        if not tier.min_side <= side <= tier.max_side:
            raise BadRequest(
                f"width and height must be {tier.min_side} to {tier.max_side} on {tier.name}", field
            )
    if width * height > tier.max_pixels:
        raise BadRequest(f"{tier.name} draws at most {tier.max_pixels} pixels", fields[0])


def size_like(reference: SentImage, tier: Tier) -> tuple[int, int]:
    """Return the reference's size, fitted into what the tier generates."""
    return fitted(reference.width, reference.height, tier)


def lone_canvas(references: Sequence[SentImage], tier: Tier) -> Canvas | None:
    """Return the canvas on which the tier keeps a reference whole; None unless it is the only one.

    If no size is asked for, the image is generated on it, and cropped back to the reference.
    """
    if len(references) != 1:
        return None
    raster = references[0].raster_for(tier.reference_limit(1))
    return tier.canvas_of(raster.width, raster.height)


def fitted(width: float, height: float, tier: Tier) -> tuple[int, int]:
    """Return the size scaled down into the tier's limits and floored to its multiple."""
    scale = min(
        1.0,
        math.sqrt(tier.max_pixels / (width * height)),
        tier.max_side / max(width, height),
    )

    def fit(side: float) -> int:
        # The epsilon: 300 * (256 / 300) may come out just below 256.
        floored = int(side * scale + 1e-6) // tier.size_multiple * tier.size_multiple
        return max(floored, tier.min_side)

    return fit(width), fit(height)


def sized(ratio: float, tier: Tier) -> tuple[int, int]:
    """Return width and height in that ratio with the tier's default area."""
    return fitted(*shape_in(tier.default_side, ratio), tier)


def ratio_of(text: str, field: str = "aspect_ratio") -> float:
    """Return width / height of `16:9`; `field` is the caller's name of it in errors."""
    match = _RATIO.fullmatch(text)
    ratio = 0.0 if match is None else int(match[1]) / int(match[2])
    if not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
        raise BadRequest(f"{field} must be from 1:4 to 4:1, like 16:9", field)
    return ratio


def side_of(text: str, field: str = "resolution") -> float:
    """Return the side of the square that `2k`, `768sq` or `1.5mp` (of 1024 x 1024 pixels) means."""
    match = _RESOLUTION.fullmatch(text)
    side = 0.0
    if match is not None and match["k"] is not None:
        side = float(match["k"]) * 1024
    elif match is not None and match["side"] is not None:
        side = float(match["side"])
    elif match is not None:
        side = math.sqrt(float(match["mp"])) * 1024
    if side < 1:
        raise BadRequest(f"{field} must be like 1k, 2k or 1 MP", field)
    return side


def shape_in(side: float, ratio: float) -> tuple[float, float]:
    """Return width and height in that ratio with the area of a square of that side."""
    return side * math.sqrt(ratio), side / math.sqrt(ratio)
