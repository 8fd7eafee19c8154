"""What a gateway has in hand is one budget: each byte is given back once, whatever happens."""

import asyncio
import contextlib
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ray.errors import Overloaded
from flux_ray.gateway.images.decode import decode
from flux_ray.gateway.memory_budget import MEMORY, MemoryBudget, Share
from flux_ray.request import RgbImage
from tests.conftest import LIMITS

MAX_BYTES = 100


def test_there_is_room_again_when_an_image_is_gone():
    held, first, second = MemoryBudget(), RgbImage(2, 2, b"a" * 12), RgbImage(2, 2, b"b" * 12)
    held.add(first, 12, 20)
    with pytest.raises(Overloaded) as refused:
        held.add(second, 12, 20)
    assert refused.value.retry_after_s
    del first
    held.add(second, 12, 20)
    assert held.num_bytes == 12


def test_what_is_decoded_is_counted(make_image):
    before = MEMORY.num_bytes
    raster = decode(make_image(96, 80), LIMITS, "image 1")
    assert MEMORY.num_bytes == before + 96 * 80 * 3
    del raster
    assert MEMORY.num_bytes == before
    assert MEMORY.num_work_bytes == 0


def test_a_gateway_that_is_full_decodes_no_more(make_image):
    full = LIMITS.model_copy(update={"max_held_bytes": 1000})
    with pytest.raises(Overloaded):
        decode(make_image(96, 80), full, "image 1")


def test_the_largest_image_may_always_be_decoded():
    assert LIMITS.max_work_bytes + LIMITS.max_kept_bytes == LIMITS.max_held_bytes
    assert LIMITS.max_work_bytes == 46 * LIMITS.max_image_pixels


def test_a_share_is_released_once_and_grows_no_more_then():
    held = MemoryBudget()
    share = held.share(MAX_BYTES)
    share.grow(60)
    with pytest.raises(Overloaded):
        share.grow(60)
    assert held.num_bytes == 60
    share.release()
    share.release()
    share.grow(10)
    assert held.num_bytes == 0


def test_who_works_waits_for_room_and_one_may_always():
    held, begun, may_end = MemoryBudget(), threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> None:
        with held.working(500, MAX_BYTES):
            order.append("second")

    with held.working(80, MAX_BYTES):
        thread = threading.Thread(target=lambda: (begun.set(), work(), may_end.set()))
        thread.start()
        begun.wait()
        order.append("first")
    may_end.wait(60)
    thread.join()
    assert order == ["first", "second"]
    assert held.num_work_bytes == 0


async def test_a_job_waits_for_room_and_others_are_refused_meanwhile():
    held = MemoryBudget()
    share = held.share(MAX_BYTES)
    share.grow(90)
    waiting = asyncio.create_task(held.room(50, MAX_BYTES))
    later = asyncio.create_task(held.room(1, MAX_BYTES))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        held.check_room(1, MAX_BYTES)
    # Who is inside already goes on.
    share.grow(5)
    assert not waiting.done() and not later.done()
    share.release()
    first, second = await asyncio.gather(waiting, later)
    assert held.num_bytes == 51
    held.check_room(1, MAX_BYTES)
    first.release()
    second.release()
    assert held.num_bytes == 0


async def test_a_job_larger_than_all_room_has_its_turn_when_nobody_holds_any():
    held = MemoryBudget()
    share = held.share(MAX_BYTES)
    share.grow(1)
    waiting = asyncio.create_task(held.room(3 * MAX_BYTES, MAX_BYTES))
    await asyncio.sleep(0)
    assert not waiting.done()
    share.release()
    (await waiting).release()
    assert held.num_bytes == 0


async def test_room_is_given_back_from_other_threads():
    held = MemoryBudget()
    share = held.share(MAX_BYTES)
    share.grow(MAX_BYTES)
    waiting = asyncio.create_task(held.room(1, MAX_BYTES))
    await asyncio.sleep(0)
    await asyncio.to_thread(share.release)
    (await waiting).release()


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["arrive", "more", "decode", "job", "leave", "leave twice", "drop", "fail"]
        ),
        st.integers(0, 60),
        st.integers(0, 9),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(actions=ACTIONS)
def test_nothing_is_left_whatever_comes_and_goes(actions):
    """Bodies grow, images are kept, jobs wait and are given up: never too much, in the end none."""
    asyncio.run(come_and_go(actions))


async def come_and_go(actions) -> None:
    crowd = Crowd()
    for action, size, number in actions:
        with contextlib.suppress(Overloaded):
            crowd.act(action, size, number)
        await asyncio.sleep(0)
        assert 0 <= crowd.held.num_bytes <= MAX_BYTES
    crowd.images.clear()
    for body in crowd.bodies:
        body.release()
    # All that wait come in, one after the other, when those before them are gone.
    for job in crowd.jobs:
        await asyncio.wait({job}, timeout=60)
        if not job.cancelled():
            job.result().release()
    assert crowd.held.num_bytes == 0


class Crowd:
    """All that may come and go, of one budget."""

    def __init__(self) -> None:
        self.held = MemoryBudget()
        self.bodies: list[Share] = []
        self.images: list[RgbImage] = []
        self.jobs: list[asyncio.Task[Share]] = []

    def act(self, action: str, size: int, number: int) -> None:
        if action == "arrive":
            self.held.check_room(size, MAX_BYTES)
            self.bodies.append(self.held.share(MAX_BYTES))
            self.bodies[-1].grow(size)
        elif action == "decode":
            self.images.append(self.held.add(RgbImage(1, 1, b""), size, MAX_BYTES))
        elif action == "job":
            self.jobs.append(asyncio.create_task(self.held.room(size, MAX_BYTES)))
        elif action == "drop" and self.images:
            self.images.pop(number % len(self.images))
        elif action == "fail" and self.jobs:
            self.jobs[number % len(self.jobs)].cancel()
        elif self.bodies:
            self.act_on_body(action, size, number % len(self.bodies))

    def act_on_body(self, action: str, size: int, index: int) -> None:
        if action == "more":
            self.bodies[index].grow(size)
        elif action.startswith("leave"):
            self.bodies[index].release()
        if action == "leave":
            self.bodies.pop(index)
