"""The world that the tiny model knows: scenes of one or two coloured shapes, and their images.

A scene can be rendered exactly, so that training data costs nothing and an image can be judged by
its pixels. Every `draw_*` function takes a random generator and returns something random.
"""

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
# The radius of a thing that is alone, and of one of two; in pixels if the shorter side is 128.
RADIUS = {"small": (16.0, 13.0), "large": (32.0, 24.0)}
# The centres of the places, x and y as fractions of the canvas.
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
# The places of the first and of the second thing.
RELATIONS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
# Pairs of shape and colour that the text encoder and the transformer never see in training. They
# tell whether the model composes what it knows, or only remembers.
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
    """One coloured shape.

    `dx` and `dy` (in pixels if the shorter side is 128) and `grow` (a factor of the radius) are
    random jitter around the named place and size.
    """

    shape: str
    color: str
    size: str
    place: str = "center"
    dx: float = 0.0
    dy: float = 0.0
    grow: float = 1.0


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; the first is `relation` (as `left of`) the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    width: int = SIDE
    height: int = SIDE


def nominal(scene: Scene) -> Scene:
    """Return the scene without jitter, which is what a prompt can ask for."""
    return replace(scene, things=tuple(replace(t, dx=0.0, dy=0.0, grow=1.0) for t in scene.things))


def geometry(thing: Thing, scene: Scene) -> tuple[float, float, float]:
    """Return a thing's centre x, centre y and radius, in pixels of the scene's canvas.

    The centre is moved, if it must be, so that the whole thing is on the canvas.
    """
    scale = min(scene.width, scene.height) / SIDE
    radius = RADIUS[thing.size][len(scene.things) - 1] * thing.grow * scale
    edge = radius + MARGIN * scale
    fx, fy = PLACES[thing.place]
    x = min(max(fx * scene.width + thing.dx * scale, edge), scene.width - edge)
    y = min(max(fy * scene.height + thing.dy * scale, edge), scene.height - edge)
    return x, y, radius


def distance(shape: str, x: Field, y: Field, radius: float) -> Field:
    """Return the signed distances of points to the outline of a shape at the origin.

    `x`, `y`, `radius` and the result are in pixels; inside of the shape distances are negative.
    """
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
    """Return x and y of the centre of each pixel, each fp32 [height, width]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)
    return x, y


def outline(thing: Thing, scene: Scene) -> Field:
    """Return each pixel's signed distance to a thing, [height, width], negative inside of it."""
    x, y = coordinates(scene.width, scene.height)
    cx, cy, radius = geometry(thing, scene)
    return distance(thing.shape, x - np.float32(cx), y - np.float32(cy), radius)


def render(scene: Scene) -> Pixels:
    """Render a scene as uint8 [height, width, 3], with edges anti-aliased over one pixel."""
    image = np.empty((scene.height, scene.width, 3), np.float32)
    image[:] = COLORS[scene.background]
    for thing in scene.things:
        cover = np.clip(0.5 - outline(thing, scene), 0, 1)[..., None]
        image = image * (1 - cover) + np.array(COLORS[thing.color], np.float32) * cover
    return image.round().astype(np.uint8)


def is_allowed(shape: str, color: str, *, held_out: bool | None) -> bool:
    """Return whether a pair of shape and colour may be used.

    `held_out` None allows any pair, False only those for training, True only the held-out ones.
    """
    return held_out is None or ((shape, color) in HELD_OUT) == held_out


def draw_thing(
    rng: random.Random,
    *,
    not_colors: tuple[str, ...],
    not_shapes: tuple[str, ...] = (),
    held_out: bool | None = False,
) -> Thing:
    """Return a random thing with jitter, placed at the centre."""
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
    """Return a random colour, white a little more often: prompts often leave that one unsaid."""
    return "white" if rng.random() < 0.15 else rng.choice(COLOR_NAMES)


def draw_single(
    rng: random.Random,
    *,
    held_out: bool | None = False,
    canvas: tuple[int, int] = (SIDE, SIDE),
) -> Scene:
    """Return a random scene of one thing."""
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
    """Return a random scene of two things in a relation; `held_out` concerns only the first."""
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
