"""The values that cross process borders."""

import dataclasses
import pickle

import pytest

from flux_ray.request import ImageRequest, Raster

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


def test_a_request_is_frozen_and_survives_a_process_border():
    assert pickle.loads(pickle.dumps(REQUEST)) == REQUEST
    with pytest.raises(dataclasses.FrozenInstanceError):
        REQUEST.seed = 8
