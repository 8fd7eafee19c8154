"""How long a running request still takes."""

from dataclasses import replace

import pytest

from flux_ray.request import ImageRequest, Progress, RanksDone, RequestEvent
from flux_ray.router.pricing.cost import Cost
from flux_ray.router.quote import FOLLOWED_S, Quote, RemainingTime, followed

REQUEST = ImageRequest("id", "tiny", "a ring", 128, 128, 10, 1.0, seed=7)


def quote(request: ImageRequest = REQUEST, denoise_s: float = 10.0) -> Quote:
    return Quote(request, Cost(1.0, denoise_s, 2.0), 13.0)


def test_at_the_first_step_it_is_as_priced() -> None:
    assert RemainingTime(quote()).left_s(Progress(1, 10), 50.0) == pytest.approx(9 * 1.0 + 2.0)


def test_then_all_that_is_left_is_as_slow_as_its_own_steps() -> None:
    pace = RemainingTime(quote())
    pace.left_s(Progress(1, 10), 50.0)
    assert pace.left_s(Progress(3, 10), 54.0) == pytest.approx(2 * (7.0 + 2.0))
    assert pace.left_s(Progress(10, 10), 68.0) == pytest.approx(4.0)


def test_news_that_come_together_say_nothing_of_the_pace() -> None:
    pace = RemainingTime(quote())
    pace.left_s(Progress(1, 10), 50.0)
    assert pace.left_s(Progress(3, 10), 50.001) == pytest.approx(7.0 + 2.0)


@pytest.mark.parametrize("slowness", [1.0, 1.5])
def test_images_and_previews_between_the_steps_are_counted(slowness: float) -> None:
    """Each of four images: four steps of 1 s, a preview after two and an image of 0.5 s each."""
    request = replace(REQUEST, num_steps=4, num_images=4, num_previews=1)
    assert request.preview_steps == (2,)
    pace, now, done = RemainingTime(Quote(request, Cost(1.0, 16.0, 4.0), 21.0)), 0.0, 0
    end = 20.0 * slowness
    for _ in range(4):
        for step in range(1, 5):
            now, done = now + slowness, done + 1
            left_s = pace.left_s(Progress(done, 16), now)
            assert done == 1 or left_s == pytest.approx(end - now)
            now += 0.5 * slowness * (step in (2, 4))
    assert now == end


def test_nobody_listens_to_what_is_over_at_once() -> None:
    short = quote(denoise_s=FOLLOWED_S - 3.1)
    assert followed(short, None, lambda left_s: None) is None
    told: list[float] = []
    heard: list[RequestEvent] = []
    for on_event in (
        followed(short, heard.append, told.append),
        followed(quote(), None, told.append),
    ):
        assert on_event is not None
        on_event(Progress(10, 10))
    assert (heard, told) == ([Progress(10, 10)], [2.0, 2.0])


def test_nothing_is_left_once_the_ranks_are_done() -> None:
    """Files are made of the images, but the replica is free; the client has no use for that."""
    told: list[float] = []
    heard: list[RequestEvent] = []
    on_event = followed(quote(), heard.append, told.append)
    assert on_event is not None
    on_event(Progress(10, 10))
    on_event(RanksDone())
    assert told == [2.0, 0.0]
    assert heard == [Progress(10, 10)]
