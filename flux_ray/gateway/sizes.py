"""Which sizes a tier draws."""

import math
import re

from flux_ray.catalog import Tier
from flux_ray.errors import BadRequest
from flux_ray.gateway.references import SentImage

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def parse_size(size: str) -> tuple[int, int]:
    """Width and height of `512x768`."""
    match = _SIZE.fullmatch(size)
    if match is None:
        raise BadRequest("size must be `auto` or WIDTHxHEIGHT, like 512x768", "size")
    return int(match[1]), int(match[2])


def check_size(width: int, height: int, tier: Tier, fields: tuple[str, str]) -> None:
    """Raises unless the tier draws pictures of that size; `fields` is where each side was sent."""
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
    """The reference's size, as far as the tier draws it."""
    return fitted(reference.width, reference.height, tier)


def fitted(width: float, height: float, tier: Tier) -> tuple[int, int]:
    """Scaled down into the tier's limits and floored to the multiple."""
    scale = min(
        1.0,
        math.sqrt(tier.max_pixels / (width * height)),
        tier.max_side / max(width, height),
    )

    def fit(side: float) -> int:
        # 300 * (256 / 300) may come out just below 256.
        floored = int(side * scale + 1e-6) // tier.size_multiple * tier.size_multiple
        return max(floored, tier.min_side)

    return fit(width), fit(height)


def sized(ratio: float, tier: Tier) -> tuple[int, int]:
    """Width and height of the tier's default area, in that ratio."""
    side = math.sqrt(ratio)
    return fitted(tier.default_side * side, tier.default_side / side, tier)
