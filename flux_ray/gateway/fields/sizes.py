"""Which sizes a tier draws."""

import math
import re

from flux_ray.catalog.tiers import Tier
from flux_ray.errors import BadRequest
from flux_ray.gateway.fields.scaled_sizes import check_scaled
from flux_ray.gateway.images.decode import SentImage

# Of BFL's documentation: sides between 1:4 and 4:1.
MAX_RATIO = 4.0
_RATIO = re.compile(r"([1-9][0-9]{0,4}):([1-9][0-9]{0,4})", re.A)
# A side in thousands of pixels, one of so many pixels, or the area in megapixels.
_RESOLUTION = re.compile(
    r"(?P<k>[0-9]{1,2}(\.[0-9]{1,2})?)k|(?P<side>[0-9]{2,5})sq|(?P<mp>[0-9]{1,3}(\.[0-9]{1,3})?)mp"
)
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def parse_size(size: str, field: str = "size") -> tuple[int, int]:
    """Width and height of `512x768`; `field` is what the caller calls it."""
    match = _SIZE.fullmatch(size)
    if match is None:
        raise BadRequest(f"{field} must be `auto` or WIDTHxHEIGHT, like 512x768", field)
    return int(match[1]), int(match[2])


def check_size(width: int, height: int, tier: Tier, fields: tuple[str, str]) -> None:
    """Raises unless the tier draws pictures of that size; `fields` is where each side was sent."""
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
    return fitted(*shape_in(tier.default_side, ratio), tier)


def ratio_of(text: str, field: str = "aspect_ratio") -> float:
    """Width by height of `16:9`; `field` is what the caller calls it."""
    match = _RATIO.fullmatch(text)
    ratio = 0.0 if match is None else int(match[1]) / int(match[2])
    if not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
        raise BadRequest(f"{field} must be from 1:4 to 4:1, like 16:9", field)
    return ratio


def side_of(text: str, field: str = "resolution") -> float:
    """Return the side of a square of `2k`, `768sq` or `1.5mp`: a megapixel is 1024 x 1024 here."""
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
    """Return width and height of the area of a square with that side, in that ratio."""
    return side * math.sqrt(ratio), side / math.sqrt(ratio)
