"""How long a running request still takes."""

from dataclasses import replace

import pytest

from flux_ray.request import ImageRequest, News, Progress
from flux_ray.router.cost import Cost
from flux_ray.router.pace import FOLLOWED_S, Pace, followed
from flux_ray.router.quote import Quote

REQUEST = ImageRequest("id", "tiny", "a ring", 128, 128, 10, 1.0, seed=7)


def quote(request: ImageRequest = REQUEST, denoise_s: float = 10.0) -> Quote:
    return Quote(request, Cost(1.0, denoise_s, 2.0), 13.0)


def test_at_the_first_step_it_is_as_priced() -> None:
    assert Pace(quote()).left_s(Progress(1, 10), 50.0) == pytest.approx(9 * 1.0 + 2.0)


def test_then_it_is_as_fast_as_its_own_steps() -> None:
    pace = Pace(quote())
    pace.left_s(Progress(1, 10), 50.0)
    assert pace.left_s(Progress(3, 10), 54.0) == pytest.approx(7 * 2.0 + 2.0)
    assert pace.left_s(Progress(10, 10), 68.0) == pytest.approx(2.0)


def test_what_comes_last_is_one_picture() -> None:
    """The others, and the previews, are among the steps."""
    request = replace(REQUEST, num_images=2, num_previews=1)
    pace = Pace(quote(request))
    assert pace.left_s(Progress(20, 20), 0.0) == pytest.approx(0.5)


def test_nobody_listens_to_what_is_over_at_once() -> None:
    short = quote(denoise_s=FOLLOWED_S - 3.1)
    assert followed(short, None, lambda left_s: None) is None
    told: list[float] = []
    heard: list[News] = []
    for hear in (followed(short, heard.append, told.append), followed(quote(), None, told.append)):
        assert hear is not None
        hear(Progress(10, 10))
    assert (heard, told) == ([Progress(10, 10)], [2.0, 2.0])
