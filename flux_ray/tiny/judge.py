"""Judge from its pixels whether an image shows a scene: colour, shape, place, size, background.

Each pixel is assigned to the nearest colour of the world; things are then found by their colour
near the place where they should be.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flux_ray.tiny.world import (
    COLORS,
    SHAPES,
    Mask,
    Pixels,
    Scene,
    Thing,
    coordinates,
    distance,
    geometry,
    outline,
)

PALETTE = np.array(list(COLORS.values()), np.float32)
COLOR_INDEX = {name: index for index, name in enumerate(COLORS)}
# Pixels on a canvas whose shorter side is 128, and a factor of the area.
PLACE_TOLERANCE = 11.0
SIZE_TOLERANCE = 1.5
# Intersection over union with the best shape; below this it counts as no shape at all.
MIN_OVERLAP = 0.6
# A share of the free pixels. A small thing that nobody asked for covers 2 % of them or more.
MIN_BACKGROUND = 0.98


@dataclass(frozen=True)
class Verdict:
    """What is right in an image. If a thing's colour is missing, nothing about it is right."""

    color: bool
    shape: bool
    place: bool
    size: bool
    background: bool

    @property
    def everything(self) -> bool:
        """Return whether all of it is right, which is what the published targets count."""
        return all((self.color, self.shape, self.place, self.size, self.background))


def nearest_colors(image: Pixels) -> NDArray[np.intp]:
    """Return the index in PALETTE of each pixel's nearest colour, [height, width]."""
    distances = ((image.astype(np.float32)[:, :, None, :] - PALETTE) ** 2).sum(-1)
    nearest: NDArray[np.intp] = distances.argmin(-1)
    return nearest


def judge(image: Pixels, scene: Scene) -> Verdict:
    """Compare an image, uint8 [height, width, 3], with the scene that it should show."""
    colors = nearest_colors(image)
    scale = min(scene.width, scene.height) / 128
    free = np.ones(colors.shape, bool)
    # The background is judged only well away from the things, whose edges may be blurred.
    for thing in scene.things:
        free &= outline(thing, scene) > 10 * scale
    background = (colors == COLOR_INDEX[scene.background])[free].mean() > MIN_BACKGROUND
    found = [judge_thing(colors, thing, scene) for thing in scene.things]
    return Verdict(
        color=all(v.color for v in found),
        shape=all(v.shape for v in found),
        place=all(v.place for v in found),
        size=all(v.size for v in found),
        background=bool(background),
    )


def judge_thing(colors: NDArray[np.intp], thing: Thing, scene: Scene) -> Verdict:
    """Judge one thing by the pixels of its colour near the place where it should be.

    `colors` is [height, width], from `nearest_colors`. The verdict's background is always right: it
    is judged once for the whole image.
    """
    x, y = coordinates(scene.width, scene.height)
    cx, cy, radius = geometry(thing, scene)
    scale = min(scene.width, scene.height) / 128
    reach = radius * 1.25 + 8 * scale
    near = (np.abs(x - cx) < reach) & (np.abs(y - cy) < reach)
    found = (colors == COLOR_INDEX[thing.color]) & near
    expected = outline(thing, scene) < 0
    ratio = found.sum() / expected.sum()
    # Too few pixels of the colour to tell a shape or a place from them.
    if ratio < 0.4:
        return Verdict(False, False, False, False, True)
    away = math.hypot(x[found].mean() - x[expected].mean(), y[found].mean() - y[expected].mean())
    return Verdict(
        color=True,
        shape=best_shape(found) == thing.shape,
        place=bool(away < PLACE_TOLERANCE * scale),
        size=bool(1 / SIZE_TOLERANCE < ratio < SIZE_TOLERANCE),
        background=True,
    )


def best_shape(found: Mask) -> str | None:
    """Return the shape that overlaps best with the pixels found, bool [height, width].

    Each shape is compared at the same area and centroid, so that neither size nor place matters.
    Return None if no overlap reaches MIN_OVERLAP.
    """
    height, width = found.shape
    x, y = coordinates(width, height)
    area, cx, cy = float(found.sum()), float(x[found].mean()), float(y[found].mean())
    best, best_overlap = None, MIN_OVERLAP
    for shape in SHAPES:
        unit_area, unit_y = unit_moments(shape)
        radius = math.sqrt(area / unit_area)
        template = distance(shape, x - np.float32(cx), y - np.float32(cy - unit_y * radius), radius)
        inside = template < 0
        overlap = (inside & found).sum() / (inside | found).sum()
        if overlap > best_overlap:
            best, best_overlap = shape, overlap
    return best


@functools.cache
def unit_moments(shape: str) -> tuple[float, float]:
    """Return the area and the vertical centroid of a shape with radius 1.

    All shapes are symmetric from left to right, so the horizontal centroid is 0.
    """
    x, y = coordinates(256, 256)
    inside = distance(shape, x - 128, y - 128, 100.0) < 0
    return float(inside.sum()) / 100.0**2, float((y[inside] - 128).mean()) / 100.0
