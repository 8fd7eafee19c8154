"""Places for bodies: none is lost, none is given twice, and no caller has more than its share."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ray.errors import GatewayFull, RateLimited
from flux_ray.gateway.intake import BodyPlaces

FOREVER_S = 3600.0


async def test_the_next_body_is_read_as_soon_as_one_is_through():
    places = BodyPlaces(8, FOREVER_S)
    async with AsyncExitStack() as first:
        await first.enter_async_context(places.place("a", 1))
        second = asyncio.create_task(anext_place(places, "a"))
        await asyncio.sleep(0)
        assert not second.done()
    await second


async def anext_place(places: BodyPlaces, caller: str, max_at_once: int = 1) -> None:
    async with places.place(caller, max_at_once):
        pass


async def test_who_waits_too_long_is_told_to_come_back():
    places = BodyPlaces(8, 0.01)
    async with places.place("a", 1):
        with pytest.raises(RateLimited, match="1 bodies of yours") as caught:
            await anext_place(places, "a")
        assert caught.value.retry_after_s == 1
        await anext_place(places, "b")
    await anext_place(places, "a")


async def test_one_caller_leaves_half_of_the_places_to_others():
    places = BodyPlaces(8, FOREVER_S)
    waiting = [asyncio.create_task(anext_place(places, "a", 1)) for _ in range(3)]
    async with places.place("a", 1):
        await asyncio.sleep(0)
        with pytest.raises(RateLimited):
            await anext_place(places, "a", 1)
        async with AsyncExitStack() as others:
            for caller in "bcde":
                await others.enter_async_context(places.place(caller, 1))
            with pytest.raises(GatewayFull):
                await anext_place(places, "f")
    await asyncio.gather(*waiting)


CALLERS = st.sampled_from("abc")
STEPS = st.lists(st.tuples(st.sampled_from(["come", "go", "leave"]), CALLERS), max_size=60)


@given(STEPS, st.integers(1, 9), st.integers(1, 4))
def test_places_are_counted_right_whatever_happens(steps, num_places, max_at_once):
    asyncio.run(count(steps, num_places, max_at_once))


async def count(steps, num_places, max_at_once):
    """Bodies come, are read, or leave while they are read or wait."""
    places, reading = BodyPlaces(num_places, FOREVER_S), {caller: 0 for caller in "abc"}
    bodies: dict[str, list[tuple[asyncio.Task[None], asyncio.Event]]] = {c: [] for c in "abc"}
    tasks: list[asyncio.Task[None]] = []

    async def read(caller: str, is_read: asyncio.Event) -> None:
        async with places.place(caller, max_at_once):
            reading[caller] += 1
            try:
                await is_read.wait()
            finally:
                reading[caller] -= 1

    for what, caller in steps:
        if what == "come":
            is_read = asyncio.Event()
            tasks.append(asyncio.create_task(read(caller, is_read)))
            bodies[caller].append((tasks[-1], is_read))
        elif bodies[caller]:
            task, is_read = bodies[caller].pop(0)
            if what == "go":
                is_read.set()
            else:
                task.cancel()
        await settle()
        assert max(reading.values()) <= max_at_once
        assert sum(not task.done() for task in tasks) <= num_places
    for task in tasks:
        task.cancel()
    await settle()
    async with AsyncExitStack() as all_places:
        for number in range(num_places):
            await all_places.enter_async_context(places.place(f"new {number}", 1))


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)
