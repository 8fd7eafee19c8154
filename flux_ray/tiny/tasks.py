"""The tasks of the tiny world: prompts with their reference images, and the scene that is right.

There are captions (text to image), edits of one reference (another colour or background) and
combinations of two references. Every `draw_*_task` returns a random one.
"""

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

# What the text encoder learns to read from a prompt; "-" means that the prompt says nothing of it.
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
    """A prompt with its references, the scene that is the right answer, and the prompt's parse.

    `parse` has the index of the right choice for each slot of SLOTS.
    """

    prompt: str
    references: tuple[Scene, ...]
    answer: Scene
    parse: tuple[int, ...]


def parse_of(**slots: str) -> tuple[int, ...]:
    """Return the parse with these choices; a slot that is not given gets its first choice."""
    return tuple(choices.index(slots.get(name, choices[0])) for name, choices in SLOTS.items())


def draw_caption_task(scene: Scene, rng: random.Random) -> Task:
    """Return a text-to-image task whose prompt is a random caption of this scene."""
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
    """Return a random caption of the scene.

    It may leave out what is the default: a large size, a white background, the centre.
    """
    article = rng.random() < 0.8
    words = thing_words(scene.things[0], rng, article=article)
    if scene.relation is None:
        words += place_words(scene.things[0].place, rng)
    else:
        words += f" {scene.relation} {thing_words(scene.things[1], rng, article=article)}"
    return words + background_words(scene, rng)


def thing_words(thing: Thing, rng: random.Random, *, article: bool) -> str:
    """Return a thing in words, as `a small red circle`; a large size is mostly left out."""
    sized = thing.size == "small" or rng.random() < 0.4
    words = f"{thing.size} {thing.color} {thing.shape}" if sized else f"{thing.color} {thing.shape}"
    return with_article(words) if article else words


def with_article(words: str) -> str:
    """Return the words with `a` or `an` in front."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def place_words(place: str, rng: random.Random) -> str:
    """Return a place in words, as ` in the top left corner`; the centre is mostly left out."""
    if place == "center":
        return "" if rng.random() < 0.75 else " in the center"
    if " " in place:
        return f" in the {place}{rng.choice((' corner', ''))}"
    return f" {'at' if place in ('top', 'bottom') else 'on'} the {place}"


def background_words(scene: Scene, rng: random.Random) -> str:
    """Return the background in words, as ` on a blue background`; white is often left out."""
    color = scene.background
    if color == "white" and rng.random() < 0.5:
        return ""
    form = rng.random()
    if form < 0.7:
        return f" on {with_article(color)} background"
    if form < 0.85:
        return f", {color} background"
    # A bare `on blue` after a place or a second thing could be read as belonging to that.
    alone = scene.relation is None and scene.things[0].place == "center"
    return f" on {color}" if alone else f" with {with_article(color)} background"


def draw_edit_scene(rng: random.Random, num_things: int | None, canvas: tuple[int, int]) -> Scene:
    """Return a random scene to edit, with one thing or two of different shapes.

    The shapes differ because a prompt such as `make the circle red` names a thing by its shape.
    """
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
    """Return a task with one reference in which a thing gets another colour.

    `held_out` concerns the new pair of shape and colour, as in `world.is_allowed`.
    """
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
    """Return a task with one reference, whose background gets another colour."""
    source = draw_edit_scene(rng, num_things, canvas)
    # Neither the colour that it has already nor one that would hide a thing.
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
    """Return a task with two references: the shape of the first in the colour of the second."""
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
    """Return a task with two references: the thing of the first on the second's background."""
    while True:
        first, second = draw_single(rng), draw_single(rng)
        if second.background in (first.background, first.things[0].color):
            continue
        verb, noun = rng.choice(("of", "from")), rng.choice(("shape", "object"))
        prompt = f"the {noun} {verb} image 1 on the background of image 2"
        answer = replace(first, background=second.background)
        return Task(prompt, (first, second), answer, parse_of(operation="background_of"))


def draw_task(rng: random.Random, *, with_pairs: bool = True) -> Task:
    """Return a random task of any kind, without held-out pairs; `with_pairs`: of two references."""
    kind = rng.random() * (1 if with_pairs else 0.88)
    if kind < 0.3:
        return draw_caption_task(draw_single(rng), rng)
    if kind < 0.65:
        return draw_caption_task(draw_double(rng), rng)
    if kind < 0.8:
        return draw_recolor_task(rng)
    if kind < 0.88:
        return draw_background_task(rng)
    return draw_color_of_task(rng) if kind < 0.94 else draw_background_of_task(rng)


def draw_corpus() -> list[str]:
    """Return prompts of every kind to train a tokenizer on.

    Pairs of shape and colour that the model must never see are included: the tokenizer learns
    words, and could not write those pairs otherwise.
    """
    rng = random.Random(1)
    corpus = []
    for _ in range(4000):
        scenes = draw_single(rng, held_out=None), draw_double(rng, held_out=None)
        corpus += [caption(scene, rng) for scene in scenes]
        corpus.append(draw_recolor_task(rng, held_out=None).prompt)
        corpus.append(draw_background_task(rng).prompt)
        corpus.append(draw_color_of_task(rng, held_out=None).prompt)
        corpus.append(draw_background_of_task(rng).prompt)
    return corpus
