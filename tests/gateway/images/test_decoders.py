"""The threads that decode: who came first is through first, and nobody who left keeps a thread."""

import asyncio
import threading

import pytest

from flux_ray.gateway.images.file_formats import FIRST, LONG_S, Decoders


async def test_the_request_that_came_first_is_decoded_first():
    decoders, may_go, done = Decoders(1), threading.Event(), []
    blocking = asyncio.create_task(decoders.run(decoders.next_order(), may_go.wait))
    await asyncio.sleep(0)
    early, late = decoders.next_order(), decoders.next_order()
    orders = {"late": late, "early": early, "late again": late, "scaled": FIRST}
    tasks = [
        asyncio.create_task(decoders.run(order, lambda name=name: done.append(name)))
        for name, order in orders.items()
    ]
    await asyncio.sleep(0)
    may_go.set()
    await asyncio.gather(blocking, *tasks)
    assert done == ["scaled", "early", "late", "late again"]


def test_who_took_long_goes_behind_all_that_wait():
    decoders = Decoders(1)
    early, late = decoders.next_order(), decoders.next_order()
    assert decoders.order_after(early, LONG_S / 2) == early
    assert decoders.order_after(early, LONG_S) > late


async def test_who_leaves_gives_the_turn_to_the_next():
    decoders, may_go, done = Decoders(1), threading.Event(), []
    blocking = asyncio.create_task(decoders.run(0, may_go.wait))
    await asyncio.sleep(0)
    leaving = asyncio.create_task(decoders.run(1, lambda: done.append("left")))
    staying = asyncio.create_task(decoders.run(2, lambda: done.append("stayed")))
    await asyncio.sleep(0)
    leaving.cancel()
    may_go.set()
    await asyncio.gather(blocking, staying)
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert done == ["stayed"]


async def test_a_failure_gives_the_turn_back():
    decoders = Decoders(1)

    def fail() -> None:
        raise ValueError("damaged")

    for _ in range(3):
        with pytest.raises(ValueError, match="damaged"):
            await decoders.run(decoders.next_order(), fail)


async def test_a_small_image_does_not_wait_for_large_ones():
    decoders, may_go, done = Decoders(2), threading.Event(), []
    large = [asyncio.create_task(decoders.run(0, may_go.wait, is_large=True)) for _ in range(3)]
    await asyncio.sleep(0)
    await decoders.run(1, lambda: done.append("small"))
    assert done == ["small"]
    may_go.set()
    assert all(await asyncio.gather(*large))


async def test_a_large_image_does_not_wait_for_small_ones_that_came_later():
    decoders, may_go, done = Decoders(1), threading.Event(), []
    blocking = asyncio.create_task(decoders.run(0, may_go.wait))
    await asyncio.sleep(0)
    orders = {"small, late": 3, "large": 2, "small, early": 1}
    tasks = [
        asyncio.create_task(
            decoders.run(order, lambda name=name: done.append(name), is_large=name == "large")
        )
        for name, order in orders.items()
    ]
    await asyncio.sleep(0)
    may_go.set()
    await asyncio.gather(blocking, *tasks)
    assert done == ["small, early", "large", "small, late"]


async def test_one_thread_serves_large_images_too():
    assert await Decoders(1).run(0, lambda: "pixels", is_large=True) == "pixels"
