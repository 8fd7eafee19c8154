"""The values that cross process borders."""

import dataclasses
import pickle

import pytest

from flux_ray.request import ImageRequest, Mask, Raster

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
    references=(Raster(1, 1, b"abc"),),
)


def test_one_seed_an_image():
    assert REQUEST.seeds == (7, 8, 9)


def test_under_a_mask_the_first_reference_has_the_size_that_is_drawn():
    two = dataclasses.replace(REQUEST, references=(Raster(9, 8, b""), Raster(7, 6, b"")))
    masked = dataclasses.replace(two, mask=Mask(9, 8, b""))
    assert two.reference_sizes == ((9, 8), (7, 6))
    assert masked.reference_sizes == ((128, 64), (7, 6))
    assert masked.references_name != two.references_name
    same = dataclasses.replace(two, width=9, height=8)
    assert dataclasses.replace(same, mask=masked.mask).references_name == same.references_name


def test_a_request_is_frozen_and_survives_a_process_border():
    assert pickle.loads(pickle.dumps(REQUEST)) == REQUEST
    with pytest.raises(dataclasses.FrozenInstanceError):
        REQUEST.seed = 8
