"""What can be asked in the tiny world: captions, edits, combinations of two, and the answers."""

import random
from dataclasses import dataclass, replace

from flux_ray.tiny.world import (
    COLOR_NAMES,
    COLORS,
    PLACES,
    RADIUS,
    RELATIONS,
    SHAPES,
    SIDE,
    Scene,
    Thing,
    draw_double,
    draw_single,
    is_allowed,
)

# What the text encoder learns to read out of a prompt; "-" where the slot is not used.
SLOTS: dict[str, tuple[str, ...]] = {
    "operation": ("single", "double", "recolor", "background", "color_of", "background_of"),
    "shape_1": ("-", *SHAPES),
    "color_1": ("-", *COLORS),
    "size_1": ("-", *RADIUS),
    "place": ("-", *PLACES),
    "background": ("-", *COLORS),
    "relation": ("-", *RELATIONS),
    "shape_2": ("-", *SHAPES),
    "color_2": ("-", *COLORS),
    "size_2": ("-", *RADIUS),
}


@dataclass(frozen=True)
class Task:
    """A prompt, the pictures that come with it, the scene that answers it, its parse."""

    prompt: str
    references: tuple[Scene, ...]
    answer: Scene
    parse: tuple[int, ...]


def parse_of(**slots: str) -> tuple[int, ...]:
    """One class index per slot of SLOTS."""
    return tuple(choices.index(slots.get(name, choices[0])) for name, choices in SLOTS.items())


def draw_caption_task(scene: Scene, rng: random.Random) -> Task:
    """Text to image: one of the ways to say this scene."""
    first = scene.things[0]
    slots = {
        "shape_1": first.shape,
        "color_1": first.color,
        "size_1": first.size,
        "background": scene.background,
    }
    if scene.relation is None:
        slots |= {"operation": "single", "place": first.place}
    else:
        second = scene.things[1]
        slots |= {
            "operation": "double",
            "relation": scene.relation,
            "shape_2": second.shape,
            "color_2": second.color,
            "size_2": second.size,
        }
    return Task(caption(scene, rng), (), scene, parse_of(**slots))


def caption(scene: Scene, rng: random.Random) -> str:
    """A sentence that says the scene. No size said means large, no background said means white."""
    article = rng.random() < 0.8
    words = thing_words(scene.things[0], rng, article=article)
    if scene.relation is None:
        words += place_words(scene.things[0].place, rng)
    else:
        words += f" {scene.relation} {thing_words(scene.things[1], rng, article=article)}"
    return words + background_words(scene, rng)


def thing_words(thing: Thing, rng: random.Random, *, article: bool) -> str:
    """`a small red circle`."""
    sized = thing.size == "small" or rng.random() < 0.4
    words = f"{thing.size} {thing.color} {thing.shape}" if sized else f"{thing.color} {thing.shape}"
    return with_article(words) if article else words


def with_article(words: str) -> str:
    """`an orange ring`."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def place_words(place: str, rng: random.Random) -> str:
    """` in the top left corner`; the centre is mostly left unsaid."""
    if place == "center":
        return "" if rng.random() < 0.75 else " in the center"
    if " " in place:
        return f" in the {place}{rng.choice((' corner', ''))}"
    return f" {'at' if place in ('top', 'bottom') else 'on'} the {place}"


def background_words(scene: Scene, rng: random.Random) -> str:
    """` on a blue background` and its short forms."""
    color = scene.background
    if color == "white" and rng.random() < 0.5:
        return ""
    form = rng.random()
    if form < 0.7:
        return f" on {with_article(color)} background"
    if form < 0.85:
        return f", {color} background"
    alone = scene.relation is None and scene.things[0].place == "center"
    return f" on {color}" if alone else f" with {with_article(color)} background"


def draw_edit_scene(rng: random.Random, num_things: int | None, canvas: tuple[int, int]) -> Scene:
    """The picture to edit: one thing, or two of different shapes."""
    if (num_things or rng.choice((1, 2))) == 1:
        return draw_single(rng, canvas=canvas)
    return draw_double(rng, different_shapes=True, canvas=canvas)


def draw_recolor_task(
    rng: random.Random,
    *,
    held_out: bool | None = False,
    num_things: int | None = None,
    canvas: tuple[int, int] = (SIDE, SIDE),
) -> Task:
    """One reference; a thing in it takes another colour (`held_out` concerns the new pair)."""
    while True:
        source = draw_edit_scene(rng, num_things, canvas)
        index = rng.randrange(len(source.things))
        thing, color = source.things[index], rng.choice(COLOR_NAMES)
        if color in (thing.color, source.background):
            continue
        if not is_allowed(thing.shape, color, held_out=held_out):
            continue
        things = list(source.things)
        things[index] = replace(thing, color=color)
        forms = ("make the {} {}", "change the {} to {}", "paint the {} {}", "turn the {} {}")
        prompt = rng.choice(forms).format(thing.shape, color)
        parse = parse_of(operation="recolor", shape_1=thing.shape, color_1=color)
        return Task(prompt, (source,), replace(source, things=tuple(things)), parse)


def draw_background_task(
    rng: random.Random, *, num_things: int | None = None, canvas: tuple[int, int] = (SIDE, SIDE)
) -> Task:
    """One reference; its background takes another colour."""
    source = draw_edit_scene(rng, num_things, canvas)
    used = {source.background, *(thing.color for thing in source.things)}
    color = rng.choice([c for c in COLORS if c not in used])
    forms = (
        "make the background {}",
        "change the background to {}",
        "turn the background {}",
        "put it on {} background",
    )
    form = rng.choice(forms)
    prompt = form.format(with_article(color) if form.startswith("put") else color)
    parse = parse_of(operation="background", background=color)
    return Task(prompt, (source,), replace(source, background=color), parse)


def draw_color_of_task(rng: random.Random, *, held_out: bool | None = False) -> Task:
    """Two references: the shape of the first in the colour of the second."""
    while True:
        first, second = draw_single(rng), draw_single(rng)
        thing, color = first.things[0], second.things[0].color
        if color in (first.background, thing.color):
            continue
        if not is_allowed(thing.shape, color, held_out=held_out):
            continue
        verb, noun = rng.choice(("of", "from")), rng.choice(("shape", "object"))
        spelling = rng.choice(("color", "colour"))
        prompt = f"the {noun} {verb} image 1 in the {spelling} of image 2"
        answer = replace(first, things=(replace(thing, color=color),))
        return Task(prompt, (first, second), answer, parse_of(operation="color_of"))


def draw_background_of_task(rng: random.Random) -> Task:
    """Two references: the thing of the first on the background of the second."""
    while True:
        first, second = draw_single(rng), draw_single(rng)
        if second.background in (first.background, first.things[0].color):
            continue
        verb, noun = rng.choice(("of", "from")), rng.choice(("shape", "object"))
        prompt = f"the {noun} {verb} image 1 on the background of image 2"
        answer = replace(first, background=second.background)
        return Task(prompt, (first, second), answer, parse_of(operation="background_of"))
