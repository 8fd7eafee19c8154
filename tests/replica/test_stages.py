"""Which stages draw a request, and which of them go together."""

from dataclasses import replace

import pytest

from flux_ray.replica.step_loop import SHORT_S, calls_of, sizes_of, stages_of
from flux_ray.request import ImageRequest, RgbImage

REQUEST = ImageRequest("a", "tiny", "a red circle", 64, 64, num_steps=3, guidance=1.0, seed=5)
IMAGE = ["prepare", "denoise", "denoise", "denoise", "decode"]


def test_a_request_is_encoded_once_and_each_image_generated() -> None:
    assert list(stages_of(replace(REQUEST, num_images=2))) == ["encode", *IMAGE, *IMAGE]


def test_previews_come_after_their_steps() -> None:
    with_preview = replace(REQUEST, num_previews=1)
    image = ["prepare", "denoise", "denoise", "preview", "denoise", "decode"]
    assert list(stages_of(with_preview)) == ["encode", *image]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (2.0, ["e", "p", "d", "d", "d", "D"]),
        (1.0, ["e", "p", "d", "d", "d", "D"]),
        (0.5, ["ep", "dd", "dD"]),
        (0.3, ["epd", "ddD"]),
        (0.0, ["epdddD"]),
    ],
)
def test_as_many_go_together_as_are_short_together(share: float, expected: list[str]) -> None:
    calls = calls_of(stages_of(REQUEST), lambda stage: share * SHORT_S)
    names = {"encode": "e", "prepare": "p", "denoise": "d", "decode": "D"}
    assert ["".join(names[stage] for stage in call) for call in calls] == expected


def test_a_long_one_goes_alone() -> None:
    seconds = {"encode": 0.01, "prepare": 0.001, "denoise": 0.3, "decode": 0.01}
    calls = list(calls_of(["encode", "prepare", "denoise", "decode"], seconds.__getitem__))
    assert calls == [("encode", "prepare"), ("denoise",), ("decode",)]


def test_what_a_stage_takes_is_asked_late() -> None:
    """The first call may teach it."""
    asked: list[str] = []

    def expected_s(stage: str) -> float:
        asked.append(stage)
        return SHORT_S

    calls = calls_of(stages_of(REQUEST), expected_s)
    next(calls)
    assert asked == ["encode", "prepare"]


def test_sizes_are_pixels_of_canvas_and_references() -> None:
    references = (RgbImage(8, 4, b""), RgbImage(2, 2, b""))
    assert sizes_of(replace(REQUEST, references=references)) == (64 * 64, 8 * 4 + 2 * 2)
