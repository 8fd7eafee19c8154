"""The renderer and the judge agree, and the judge is not easily pleased."""

import random
from dataclasses import replace

import numpy as np
import pytest

from flux_ray.tiny import world
from flux_ray.tiny.judge import judge
from flux_ray.tiny.world import Scene, Thing

RED_ON_BLUE = Scene("blue", (Thing("circle", "red", "large"),))


def change(scene: Scene, **thing: str) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **thing), *scene.things[1:]))


def test_a_rendered_scene_has_the_colours_that_it_names() -> None:
    image = world.render(RED_ON_BLUE)
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert tuple(image[64, 64]) == world.COLORS["red"]
    assert tuple(image[2, 2]) == world.COLORS["blue"]


@pytest.mark.parametrize("draw", [world.draw_single, world.draw_double])
@pytest.mark.parametrize("canvas", [(128, 128), (96, 96), (192, 128), (128, 192)])
def test_the_judge_accepts_every_true_image(draw, canvas) -> None:
    rng = random.Random(1)
    for _ in range(25):
        scene = draw(rng, held_out=None, canvas=canvas)
        assert judge(world.render(scene), world.nominal(scene)).everything, scene


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"color": "green"}, "color"),
        ({"shape": "square"}, "shape"),
        ({"shape": "ring"}, "shape"),
        ({"place": "top left"}, "place"),
        ({"size": "small"}, "size"),
    ],
)
def test_the_judge_names_what_is_wrong(wrong: dict[str, str], part: str) -> None:
    verdict = judge(world.render(change(RED_ON_BLUE, **wrong)), RED_ON_BLUE)
    assert not getattr(verdict, part)
    assert not verdict.everything
    assert verdict.background or part in ("place",)


def test_the_judge_sees_a_wrong_background() -> None:
    image = world.render(replace(RED_ON_BLUE, background="white"))
    verdict = judge(image, RED_ON_BLUE)
    assert not verdict.background
    assert verdict.color and verdict.shape


def test_a_blob_passes_as_no_shape_but_a_circle() -> None:
    rng = random.Random(3)
    for _ in range(50):
        scene = world.draw_single(rng)
        if scene.things[0].shape != "circle":
            verdict = judge(world.render(change(scene, shape="circle")), scene)
            assert not verdict.shape, scene


def test_noise_is_no_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    assert not judge(noise, RED_ON_BLUE).everything


def test_the_judge_sees_a_thing_that_nobody_asked_for() -> None:
    asked = Scene("blue", (Thing("circle", "red", "small", "left"),))
    extra = replace(asked, things=(Thing("ring", "green", "small", "right"),))
    image = world.render(asked)
    image[:, 64:] = world.render(extra)[:, 64:]
    assert judge(world.render(asked), asked).everything
    assert not judge(image, asked).background
