"""Decoded pictures are counted while somebody holds them."""

import pytest

from flux_ray.errors import Overloaded
from flux_ray.gateway.held import HELD, Held
from flux_ray.gateway.references import decode
from flux_ray.request import Raster
from tests.conftest import LIMITS


def test_there_is_room_again_when_a_picture_is_gone():
    held, first, second = Held(), Raster(2, 2, b"a" * 12), Raster(2, 2, b"b" * 12)
    held.add(first, 20)
    with pytest.raises(Overloaded) as refused:
        held.add(second, 20)
    assert refused.value.retry_after_s
    del first
    held.add(second, 20)
    assert held.num_bytes == 12


def test_what_is_decoded_is_counted(picture):
    before = HELD.num_bytes
    raster = decode(picture(96, 80), LIMITS, "image 1")
    assert HELD.num_bytes == before + 96 * 80 * 3
    del raster
    assert HELD.num_bytes == before


def test_a_gateway_that_is_full_decodes_no_more(picture):
    full = LIMITS.model_copy(update={"max_held_bytes": 1000})
    with pytest.raises(Overloaded):
        decode(picture(96, 80), full, "image 1")
