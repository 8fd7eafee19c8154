"""Prompts say what their answers show, and held-out pairs stay out of training."""

import random

import pytest

from flux_ray.tiny import tasks, world
from flux_ray.tiny import train_transformer as pool
from flux_ray.tiny.world import HELD_OUT, Scene, Thing


def test_a_caption_names_everything_that_is_not_a_default() -> None:
    rng = random.Random(0)
    scene = Scene("blue", (Thing("circle", "red", "small", "top left"),))
    for _ in range(50):
        text = tasks.caption(scene, rng)
        assert all(word in text for word in ("small", "red", "circle", "top left", "blue"))


def test_a_plain_caption_is_what_a_user_would_type() -> None:
    scene = Scene("blue", (Thing("circle", "red", "large"),))
    rng = random.Random(0)
    captions = {tasks.caption(scene, rng) for _ in range(300)}
    assert "a red circle on a blue background" in captions


def test_an_edit_changes_one_thing_only() -> None:
    rng = random.Random(0)
    for _ in range(100):
        task = tasks.draw_recolor_task(rng)
        source, answer = task.references[0], task.answer
        changed = [a != b for a, b in zip(source.things, answer.things, strict=True)]
        assert sum(changed) == 1 and source.background == answer.background


def test_two_references_answer_with_the_first_thing() -> None:
    rng = random.Random(0)
    for _ in range(100):
        colored, placed = tasks.draw_color_of_task(rng), tasks.draw_background_of_task(rng)
        assert colored.answer.things[0].color == colored.references[1].things[0].color
        assert colored.answer.things[0].shape == colored.references[0].things[0].shape
        assert placed.answer.background == placed.references[1].background
        assert placed.answer.things == placed.references[0].things


def test_training_never_shows_a_held_out_pair() -> None:
    for _, _, task in pool.draw_tasks(random.Random(4), scale=0.05):
        for scene in (*task.references, task.answer):
            for thing in scene.things:
                assert (thing.shape, thing.color) not in HELD_OUT, task


def test_the_pool_has_every_kind_and_every_canvas() -> None:
    drawn = {(kind, canvas) for kind, canvas, _ in pool.draw_tasks(random.Random(4), scale=0.02)}
    assert {kind for kind, _ in drawn} == {"text", "edit", "combine"}
    assert {canvas for _, canvas in drawn} == {pool.SQUARE, *pool.OTHER_CANVASES}


@pytest.mark.parametrize("draw", [world.draw_single, world.draw_double])
def test_held_out_sets_draw_only_held_out_pairs(draw) -> None:
    rng = random.Random(5)
    for _ in range(100):
        thing = draw(rng, held_out=True).things[0]
        assert (thing.shape, thing.color) in HELD_OUT


def test_every_parse_fits_its_slots() -> None:
    rng = random.Random(6)
    choices = list(tasks.SLOTS.values())
    for draw in (tasks.draw_recolor_task, tasks.draw_background_task, tasks.draw_color_of_task):
        parse = draw(rng).parse
        assert len(parse) == len(choices)
        assert all(0 <= index < len(slot) for index, slot in zip(parse, choices, strict=True))
