"""Sizes that a tier does not generate: which size is generated instead, and scaled to them."""

import math

from flux_ray.catalog.tiers import Tier
from flux_ray.errors import BadRequest
from flux_ray.request import ImageRequest

# What an image may be scaled to, where its tier generates nothing as large: as BFL's API has it.
MIN_SCALED_SIDE = 16
MAX_SCALED_SIDE = 4096
MAX_SCALED_PIXELS = 4 * 1024 * 1024
MAX_SCALED_RATIO = 4
# A shape that is off by a thirtieth is as bad as twice the area, or half.
SHAPE_WEIGHT = 20.0


def check_scaled(width: int, height: int, tier: Tier, fields: tuple[str, str]) -> None:
    """Raise unless an image may be scaled to that size."""
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
    """Return the size at which the tier generates an image of that one; it is scaled then."""
    if not tier.scales_sizes or generates(width, height, tier):
        return width, height
    sides = range(tier.min_side, tier.max_side + 1, tier.size_multiple)
    sizes = [(w, h) for w in sides for h in sides if generates(w, h, tier)]
    area = tier.default_side**2

    def badness(size: tuple[int, int]) -> float:
        shape = abs(math.log(size[0] / size[1] * height / width))
        return SHAPE_WEIGHT * shape + abs(math.log(size[0] * size[1] / area))

    return min(sizes, key=badness)


def generates(width: int, height: int, tier: Tier) -> bool:
    """Say whether the tier generates that size itself."""
    sides = (width, height)
    return (
        all(tier.min_side <= side <= tier.max_side for side in sides)
        and not any(side % tier.size_multiple for side in sides)
        and width * height <= tier.max_pixels
    )


def size_notes(request: ImageRequest) -> list[str]:
    """Tell the caller where its images are not generated at their size."""
    if request.encoding.scaled_to is None:
        return []
    asked = "{}x{}".format(*request.encoding.scaled_to)
    drawn = f"{request.width}x{request.height}"
    return [f"{request.tier} generates {drawn} best: the image was scaled from that to {asked}"]
