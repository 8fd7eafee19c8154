"""The canvas on which a model keeps a lone reference whole, instead of cutting it to whole tokens.

The image is generated on the same canvas, and cropped back to where the reference is on it.
"""

import math
from dataclasses import dataclass

from flux_ray.catalog.flops import scaled_size

# How much smaller a reference is tried if its canvas is too large, as diffusers does it.
SHRINK = 0.995


@dataclass(frozen=True)
class Canvas:
    """A canvas of whole tokens: its size, and the part of it that a reference takes, in pixels.

    `box`: left, top, right and bottom of that part. The reference is in the middle.
    """

    width: int
    height: int
    box: tuple[int, int, int, int]

    @property
    def pixels(self) -> int:
        """Return the number of pixels of the whole canvas."""
        return self.width * self.height

    @property
    def crop(self) -> tuple[int, int, int, int] | None:
        """Return the box to which an image is cropped back; None if it takes the whole canvas."""
        return None if self.box == (0, 0, self.width, self.height) else self.box


def canvas_for(
    width: int, height: int, *, multiple: int, max_pixels: int, min_side: int, max_side: int
) -> Canvas:
    """Return the canvas for a reference of this size, scaled down until its canvas fits.

    Sides of the canvas are multiples of `multiple`. Exactly as in diffusers' Flux3ImageProcessor.
    """
    scale = min(1.0, math.sqrt(max_pixels / (width * height)), max_side / max(width, height))
    while True:
        fitted = [max(1, round(side * scale)) for side in (width, height)]
        sides = [min(max_side, max(min_side, -(-side // multiple) * multiple)) for side in fitted]
        if sides[0] * sides[1] <= max_pixels:
            break
        scale *= SHRINK
    left, top = ((side - inner) // 2 for side, inner in zip(sides, fitted, strict=True))
    return Canvas(sides[0], sides[1], (left, top, left + fitted[0], top + fitted[1]))


@dataclass(frozen=True)
class CanvasLimits:
    """How large the canvas of a lone reference may be: the model scales the reference down for it.

    The sides of a canvas are multiples of `multiple`.
    """

    multiple: int
    max_pixels: int
    min_side: int
    max_side: int

    def canvas_of(self, width: int, height: int) -> Canvas:
        """Return the canvas for a reference of this size."""
        return canvas_for(
            width,
            height,
            multiple=self.multiple,
            max_pixels=self.max_pixels,
            min_side=self.min_side,
            max_side=self.max_side,
        )


# To what a model scales a reference down: to so many pixels, or to its part of a canvas.
ReferenceLimit = int | CanvasLimits


def limited_size(width: int, height: int, limit: ReferenceLimit) -> tuple[int, int]:
    """Return width and height of a reference as the model scales it down; it never enlarges."""
    if isinstance(limit, int):
        return scaled_size(width, height, limit)
    left, top, right, bottom = limit.canvas_of(width, height).box
    return right - left, bottom - top
