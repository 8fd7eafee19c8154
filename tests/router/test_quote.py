"""By which name a request is recognized when it comes again: no two that differ share one."""

from dataclasses import fields, replace
from typing import Any

import pytest

from flux_ray.jobs.serialization import defer, pack
from flux_ray.request import Encoding, ImageRequest, Mask, RgbImage
from flux_ray.router.pricing import CostModel
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.quote import ANYONE, Caller, quote_for, submission_for, work_of

RED, BLUE = RgbImage(2, 1, b"\xff\0\0" * 2), RgbImage(2, 1, b"\0\0\xff" * 2)
MASK = Mask(2, 1, b"\xff\0")
REQUEST = ImageRequest("id", "tiny", "a ring", 128, 64, 4, 1.0, 7, references=(RED, BLUE))
MASKED = replace(REQUEST, mask=MASK)
# Each field with another value, which makes it another request.
OTHERS: dict[str, Any] = {
    "tier": "tiny-tp2",
    "prompt": "a ring ",
    "width": 64,
    "height": 128,
    "num_steps": 5,
    "guidance": 1.5,
    "num_images": 2,
    "references": (BLUE, RED),
    "encoding": Encoding("jpeg"),
    "mask": MASK,
    "num_previews": 1,
    "negative_prompt": "",
    "true_cfg_scale": 2.0,
    "strength": 0.5,
    "follows_reference": True,
    "allow_truncation": True,
}
NAMES = [each.name for each in fields(ImageRequest)]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("request_id", "seed")])
def test_another_value_of_any_field_is_another_request(name: str) -> None:
    assert work_of(replace(REQUEST, **{name: OTHERS[name]})) != work_of(REQUEST)


@pytest.mark.parametrize(
    "other",
    [
        replace(MASKED, references=(RED,)),
        replace(MASKED, references=(RgbImage(1, 2, RED.rgb), BLUE)),
        replace(MASKED, references=(replace(RED, rgb=b"\xfe" + RED.rgb[1:]), BLUE)),
        replace(MASKED, mask=Mask(2, 1, b"\0\xff")),
        replace(MASKED, mask=Mask(1, 2, MASK.marks)),
        replace(MASKED, encoding=Encoding(quality=90)),
        replace(MASKED, encoding=Encoding(scaled_to=(64, 32))),
        replace(MASKED, encoding=Encoding(cropped_to=(0, 0, 64, 32))),
        replace(MASKED, prompt="", negative_prompt="a ring"),
    ],
)
def test_another_pixel_or_file_is_another_request(other: ImageRequest) -> None:
    assert work_of(other) != work_of(MASKED)
    # A job that waits has digests in the place of pixels.
    jobs = [defer(pack(each).row, "job", None) for each in (other, MASKED)]
    assert [*map(work_of, jobs)] == [work_of(other), work_of(MASKED)]


def test_it_comes_again_under_another_id_and_a_job_with_its_seed() -> None:
    prices = CostModel({"tiny": ReplicaSpec("cpu", dtype="float32")})

    def named(request: ImageRequest, caller: Caller) -> str:
        return submission_for(quote_for(request, prices), 1, 60.0, caller).work

    again = replace(MASKED, request_id="another")
    reseeded = replace(again, seed=8)
    assert named(again, ANYONE) == named(reseeded, ANYONE) == named(MASKED, ANYONE)
    job = Caller(is_job=True)
    assert named(again, job) == named(MASKED, job) != named(reseeded, job)
