"""The values that cross process borders."""

import dataclasses
import pickle

import pytest

from flux_ray.request import ImageRequest, Mask, Progress, RgbImage

REQUEST = ImageRequest(
    "id",
    "tiny",
    "a ring",
    128,
    64,
    4,
    1.0,
    seed=7,
    num_images=3,
    references=(RgbImage(1, 1, b"abc"),),
)


def test_one_seed_an_image():
    assert REQUEST.seeds == (7, 8, 9)


def test_under_a_mask_the_first_reference_has_the_size_that_is_generated():
    two = dataclasses.replace(REQUEST, references=(RgbImage(9, 8, b""), RgbImage(7, 6, b"")))
    masked = dataclasses.replace(two, mask=Mask(9, 8, b""))
    assert two.reference_sizes == ((9, 8), (7, 6))
    assert masked.reference_sizes == ((128, 64), (7, 6))
    assert masked.references_name != two.references_name
    same = dataclasses.replace(two, width=9, height=8)
    assert dataclasses.replace(same, mask=masked.mask).references_name == same.references_name


@pytest.mark.parametrize(
    ("num_steps", "num_previews", "expected"),
    [
        (4, 0, ()),
        (4, 1, (2,)),
        (4, 3, (1, 2, 3)),
        (50, 3, (12, 25, 38)),
        (28, 2, (9, 19)),
        (2, 3, (1,)),
        (1, 3, ()),
    ],
)
def test_previews_are_spread_over_the_steps(num_steps, num_previews, expected):
    request = dataclasses.replace(REQUEST, num_steps=num_steps, num_previews=num_previews)
    assert request.preview_steps == expected


def test_progress_is_a_share_of_all_steps():
    assert Progress(3, REQUEST.num_denoise_steps).share == 3 / 12


@pytest.mark.parametrize(("strength", "num_made"), [(1.0, 10), (0.8, 8), (0.25, 3), (0.01, 1)])
def test_strength_leaves_out_steps_of_an_edit(strength: float, num_made: int) -> None:
    """Its previews are among the steps that are made."""
    image, mask = RgbImage(64, 64, bytes(64 * 64 * 3)), Mask(64, 64, bytes(64 * 64))
    edit = dataclasses.replace(
        REQUEST, num_steps=10, references=(image,), mask=mask, strength=strength
    )
    assert edit.num_steps_made == num_made
    assert edit.num_denoise_steps == num_made * edit.num_images
    previewed = dataclasses.replace(edit, num_previews=3)
    assert all(step < num_made for step in previewed.preview_steps)
    plain = dataclasses.replace(edit, mask=None)
    assert plain.num_steps_made == 10, "without an image to start from"


def test_a_request_is_frozen_and_survives_a_process_border():
    assert pickle.loads(pickle.dumps(REQUEST)) == REQUEST
    with pytest.raises(dataclasses.FrozenInstanceError):
        REQUEST.seed = 8
