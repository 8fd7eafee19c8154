"""The world that the tiny model draws: scenes of one or two coloured shapes, and their pictures."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Field = NDArray[np.floating[Any]]

COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "purple": (140, 60, 190),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
COLOR_NAMES = tuple(COLORS)
SHAPES = ("circle", "square", "triangle", "ring", "cross")
# Pixels on a canvas whose shorter side is 128: alone, and as one of two.
RADIUS = {"small": (16.0, 13.0), "large": (32.0, 24.0)}
# Fractions of the canvas.
PLACES = {
    "center": (0.5, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
# Where the first and the second thing of a pair stand.
RELATIONS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
# Pairs that the text encoder and the transformer never see: the test of composition.
HELD_OUT = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "yellow"),
        ("ring", "red"),
        ("cross", "green"),
    }
)
SIDE = 128
Canvas = tuple[int, int]
SQUARE: Canvas = (SIDE, SIDE)
OTHER_CANVASES: tuple[Canvas, ...] = (
    (96, 96),
    (128, 96),
    (96, 128),
    (160, 128),
    (128, 160),
    (192, 128),
    (128, 192),
    (160, 160),
    (192, 192),
)
MARGIN = 3.0


@dataclass(frozen=True)
class Thing:
    """One shape; `dx`, `dy` (pixels at 128) and `grow` are its jitter around the named place."""

    shape: str
    color: str
    size: str
    place: str = "center"
    dx: float = 0.0
    dy: float = 0.0
    grow: float = 1.0


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `relation` reads first thing to second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    width: int = SIDE
    height: int = SIDE


def nominal(scene: Scene) -> Scene:
    """The scene without jitter: what a prompt asks for."""
    return replace(scene, things=tuple(replace(t, dx=0.0, dy=0.0, grow=1.0) for t in scene.things))


def geometry(thing: Thing, scene: Scene) -> tuple[float, float, float]:
    """Centre x, centre y and radius in pixels of this canvas."""
    scale = min(scene.width, scene.height) / SIDE
    radius = RADIUS[thing.size][len(scene.things) - 1] * thing.grow * scale
    edge = radius + MARGIN * scale
    fx, fy = PLACES[thing.place]
    x = min(max(fx * scene.width + thing.dx * scale, edge), scene.width - edge)
    y = min(max(fy * scene.height + thing.dy * scale, edge), scene.height - edge)
    return x, y, radius


def distance(shape: str, x: Field, y: Field, radius: float) -> Field:
    """Signed distance in pixels to the outline of a shape at the origin, negative inside."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.88 * radius
    if shape == "triangle":
        slope = np.float32(1 / math.sqrt(5))
        sides: Field = np.maximum((2 * ax - y - radius) * slope, y - 0.8 * radius)
        return sides
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
    arm = 0.34 * radius
    return np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ax - arm, ay - radius))


def coordinates(width: int, height: int) -> tuple[Field, Field]:
    """Pixel centres, each [height, width]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)
    return x, y


def outline(thing: Thing, scene: Scene) -> Field:
    """Signed distance of every pixel to the thing, [height, width]."""
    x, y = coordinates(scene.width, scene.height)
    cx, cy, radius = geometry(thing, scene)
    return distance(thing.shape, x - np.float32(cx), y - np.float32(cy), radius)


def render(scene: Scene) -> Pixels:
    """The picture of a scene, uint8 [height, width, 3], edges anti-aliased over one pixel."""
    image = np.empty((scene.height, scene.width, 3), np.float32)
    image[:] = COLORS[scene.background]
    for thing in scene.things:
        cover = np.clip(0.5 - outline(thing, scene), 0, 1)[..., None]
        image = image * (1 - cover) + np.array(COLORS[thing.color], np.float32) * cover
    return image.round().astype(np.uint8)


def is_allowed(shape: str, color: str, *, held_out: bool | None) -> bool:
    """held_out None: any pair; False: only pairs for training; True: only held-out pairs."""
    return held_out is None or ((shape, color) in HELD_OUT) == held_out


def draw_thing(
    rng: random.Random,
    *,
    not_colors: tuple[str, ...],
    not_shapes: tuple[str, ...] = (),
    held_out: bool | None = False,
) -> Thing:
    """A random thing with its jitter, at the centre."""
    while True:
        shape, color = rng.choice(SHAPES), rng.choice(COLOR_NAMES)
        if shape in not_shapes or color in not_colors:
            continue
        if is_allowed(shape, color, held_out=held_out):
            break
    return Thing(
        shape,
        color,
        rng.choice(tuple(RADIUS)),
        dx=rng.uniform(-2, 2),
        dy=rng.uniform(-2, 2),
        grow=rng.uniform(0.96, 1.04),
    )


def draw_background(rng: random.Random) -> str:
    """Any colour; white, which a prompt need not name, comes a little more often."""
    return "white" if rng.random() < 0.15 else rng.choice(COLOR_NAMES)


def draw_single(
    rng: random.Random,
    *,
    held_out: bool | None = False,
    canvas: tuple[int, int] = (SIDE, SIDE),
) -> Scene:
    """A random scene of one thing."""
    background = draw_background(rng)
    thing = draw_thing(rng, not_colors=(background,), held_out=held_out)
    place = "center" if rng.random() < 0.4 else rng.choice(tuple(PLACES)[1:])
    width, height = canvas
    return Scene(background, (replace(thing, place=place),), width=width, height=height)


def draw_double(
    rng: random.Random,
    *,
    held_out: bool | None = False,
    different_shapes: bool = False,
    canvas: tuple[int, int] = (SIDE, SIDE),
) -> Scene:
    """A random scene of two things in a relation; `held_out` concerns the first."""
    background = draw_background(rng)
    first = draw_thing(rng, not_colors=(background,), held_out=held_out)
    second = draw_thing(
        rng,
        not_colors=(background,),
        not_shapes=(first.shape,) if different_shapes else (),
        held_out=None if held_out is None else False,
    )
    relation = rng.choice(tuple(RELATIONS))
    places = RELATIONS[relation]
    things = (replace(first, place=places[0]), replace(second, place=places[1]))
    width, height = canvas
    return Scene(background, things, relation, width, height)
