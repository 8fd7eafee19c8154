"""On a tier that keeps a lone reference whole, its image has exactly the reference's size."""

from typing import Any

import pytest

from flux_ray.catalog.canvas import limited_size
from flux_ray.catalog.tiers import tier_for
from flux_ray.config.gateway import Limits
from flux_ray.gateway.bfl.fields import BflFields
from flux_ray.gateway.bfl.request import job_request_for
from flux_ray.gateway.fields.sizes import lone_canvas
from flux_ray.gateway.images.decode import SentImage
from flux_ray.gateway.images.sources import RequestImages
from flux_ray.gateway.openai.answer import usage_for
from flux_ray.gateway.openai.fields import ImageFields
from flux_ray.gateway.openai.request import request_for
from flux_ray.request import ImageRequest, RgbImage
from flux_ray.router.pricing.cost import work_of

TIER = tier_for("flux-3-klein")


def sent(width: int, height: int) -> SentImage:
    """A reference; its pixels are looked at by nobody here."""
    raster = RgbImage(width, height, b"")
    return SentImage(width, height, {TIER.reference_limit(num): raster for num in (1, 2)})


def asked(*references: SentImage, tier: str = TIER.name, **fields: Any) -> ImageRequest:
    wish = ImageFields.of({"prompt": "a ring"} | fields, {})
    return request_for(wish, tier_for(tier), Limits(), RequestImages(references))


def asked_of_bfl(*references: SentImage, **fields: Any) -> ImageRequest:
    wish = BflFields.model_validate({"prompt": "a ring"} | fields)
    return job_request_for(wish, "flux-dev", TIER, Limits(), RequestImages(references))


@pytest.mark.parametrize("ask", [asked, asked_of_bfl])
def test_it_is_generated_on_a_canvas_and_cropped_back(ask: Any) -> None:
    request = ask(sent(100, 70))
    assert (request.width, request.height) == (112, 80)
    assert request.encoding.cropped_to == (6, 5, 106, 75)
    assert request.output_size == (100, 70)
    whole = ask(sent(128, 96))
    assert (whole.width, whole.height, whole.encoding.cropped_to) == (128, 96, None)


@pytest.mark.parametrize("ask", [asked, asked_of_bfl])
def test_a_size_that_is_asked_for_is_not_cropped(ask: Any) -> None:
    request = ask(sent(100, 70), width=112, height=80)
    assert (request.width, request.height, request.encoding.cropped_to) == (112, 80, None)
    assert ask(sent(100, 70), aspect_ratio="1:1").encoding.cropped_to is None


def test_several_are_cut_as_on_other_tiers() -> None:
    request = asked(sent(100, 70), sent(64, 64))
    assert (request.width, request.height, request.encoding.cropped_to) == (96, 64, None)
    klein = tier_for("flux-2-klein-4b")
    assert lone_canvas((sent(100, 70),), klein) is None
    assert klein.reference_limit(1) == klein.reference_limit(2) == klein.max_reference_pixels


def test_its_price_and_usage_are_those_of_the_canvas() -> None:
    request = asked(sent(100, 70))
    assert work_of(request).references == (112 * 80,)
    assert usage_for(request).input_tokens_details.image_tokens == 7 * 5
    two = asked(sent(100, 70), sent(64, 64))
    assert work_of(two).references == (96 * 64, 64 * 64)
    assert usage_for(two).input_tokens_details.image_tokens == 6 * 4 + 16


def test_a_reference_of_four_megapixels_is_taken_whole_if_it_is_alone() -> None:
    assert limited_size(3000, 3000, TIER.reference_limit(1)) == (2048, 2048)
    assert limited_size(3000, 3000, TIER.reference_limit(2)) == (1024, 1024)
    assert TIER.pixels_added_by(2000, 2000, is_alone=True) == 2000 * 2000
    assert TIER.pixels_added_by(2000, 2000) == 1024 * 1024
