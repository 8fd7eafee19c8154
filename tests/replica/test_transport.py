"""The line from a leader to a rank, over real sockets: order, errors, strangers, and its end."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from flux_ray.errors import BadReference
from flux_ray.replica import transport as module
from flux_ray.replica.transport import (
    Address,
    RankConnection,
    RankServer,
    StageFailed,
    answer_parts,
    connect,
    encode_frame,
)
from flux_ray.request import RgbImage
from flux_ray.stages import DenoisedImage


def run(order: str, *payload: object) -> object:
    """What a rank does: as it is told."""
    if order == "mistake":
        raise BadReference("too small", "image")
    if order == "bug":
        raise StageFailed("KeyError: 'a bug'")
    if order == "end":
        raise SystemExit
    return order, threading.get_ident(), payload


@pytest.fixture
def address() -> Iterator[Address]:
    """Of a rank on a thread, as an actor's call would have it; it ends with its leader."""
    extension = RankServer("127.0.0.1")

    def work() -> None:
        with contextlib.suppress(SystemExit):
            extension.answer(run)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield extension.address
    thread.join(5)
    assert not thread.is_alive()


@pytest.fixture
async def line(address: Address) -> AsyncIterator[RankConnection]:
    line = await connect(address)
    yield line
    line.close()


async def answers_to(line: RankConnection, *calls: tuple[object, ...]) -> list[object]:
    async with asyncio.timeout(10):
        waiting = [line.call(encode_frame(call)) for call in calls]
        return await asyncio.gather(*waiting, return_exceptions=True)


async def test_calls_are_answered_in_order_and_on_one_thread(line: RankConnection) -> None:
    answers = await answers_to(line, *((f"{number}", number) for number in range(50)))
    orders, threads, payloads = zip(*answers, strict=True)
    assert orders == tuple(map(str, range(50)))
    assert payloads == tuple((number,) for number in range(50))
    assert len(set(threads)) == 1


async def test_a_large_call_and_its_large_answer_come_whole(line: RankConnection) -> None:
    large = bytes(range(256)) * 2**16
    (answer,) = await answers_to(line, ("draw", large))
    assert isinstance(answer, tuple)
    assert answer[2] == (large,)


async def test_pixels_come_as_they_lay_in_memory(line: RankConnection) -> None:
    """However many, among other things, and none of them as part of a pickle."""
    rasters = [RgbImage(256, 256 * n, bytes(range(256)) * 768 * n) for n in range(4)]
    answers = await answers_to(line, ("draw", *rasters), ("draw", DenoisedImage(rasters[3], 7)))
    first, second = answers
    assert isinstance(first, tuple) and isinstance(second, tuple)
    assert first[2] == tuple(rasters)
    assert second[2] == (DenoisedImage(rasters[3], 7),)
    assert all(type(raster.rgb) is bytes for raster in first[2])
    pickled, *buffers = answer_parts(rasters[1:])
    assert len(pickled) < 1000
    assert [bytes(data) for data in buffers[1::2]] == [raster.rgb for raster in rasters[1:]]


async def test_what_a_rank_raised_is_raised(line: RankConnection) -> None:
    mistake, bug, answer = await answers_to(line, ("mistake",), ("bug",), ("draw",))
    assert type(mistake) is BadReference
    assert (str(mistake), mistake.field) == ("too small", "image")
    assert type(bug) is StageFailed
    assert isinstance(answer, tuple), "and the rank works on"


async def test_a_call_that_was_given_up_shifts_no_answers(line: RankConnection) -> None:
    given_up = line.call(encode_frame(("first",)))
    given_up.cancel()
    (answer,) = await answers_to(line, ("second",))
    assert isinstance(answer, tuple)
    assert answer[0] == "second"


async def test_a_line_is_closed_when_the_rank_has_ended(line: RankConnection) -> None:
    waiting = line.call(encode_frame(("end",)))
    async with asyncio.timeout(5):
        await line.closed
    assert not waiting.done(), "the group ends it, and tells why"


def say_nothing(address: Address) -> socket.socket:
    return socket.create_connection((address.host, address.port))


def say_something_else(address: Address) -> socket.socket:
    stranger = say_nothing(address)
    stranger.sendall(b"x" * module.TOKEN_BYTES + encode_frame(("end",)))
    return stranger


def leave(address: Address) -> socket.socket:
    stranger = say_nothing(address)
    stranger.close()
    return stranger


@pytest.mark.parametrize("come", [say_nothing, say_something_else, leave])
async def test_a_stranger_is_not_believed(
    come: Callable[[Address], socket.socket], address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKEN_S", 0.1)
    with come(address):
        line = await connect(address)
        (answer,) = await answers_to(line, ("draw",))
    assert isinstance(answer, tuple)
    line.close()


def test_a_token_is_in_no_log() -> None:
    assert "secret" not in repr(Address("127.0.0.1", 1, b"secret"))


class Step:
    """A call that was begun; it is done when it is told to be, or when it is waited for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log = log
        self.name = name

    def is_done(self) -> bool:
        return f"{self.name} done" in self.log

    def outcome(self) -> str:
        self.log.append(f"{self.name} waited for")
        if self.name == "fault":
            raise StageFailed("an illegal access")
        return self.name


class Card:
    """A rank on a thread: calls named `step...` are begun, all others done at once."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.extension = RankServer("127.0.0.1")
        self.thread = threading.Thread(target=self._work, daemon=True)

    def run(self, name: str) -> object:
        self.log.append(name)
        return Step(self.log, name) if name.startswith(("step", "fault")) else name

    def _work(self) -> None:
        self.extension.answer(self.run, lambda name: name.startswith("step"))


@pytest.fixture
async def card() -> AsyncIterator[Card]:
    card = Card()
    yield card
    await asyncio.to_thread(card.thread.join, 10)
    assert not card.thread.is_alive()


async def test_a_step_is_begun_before_the_former_one_is_waited_for(card: Card) -> None:
    line = await connect(card.extension.address)
    calls = ("encode", "step 1", "step 2", "step 3", "decode", "step 4")
    # All of them are there before it begins.
    waiting = [line.call(encode_frame((name,))) for name in calls]
    await asyncio.sleep(0.05)
    card.thread.start()
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*waiting[:-1])
        card.log.append("step 4 done")
        answers.append(await waiting[-1])
    assert tuple(answers) == calls
    line.close()
    steps = ["step 1", "step 2", "step 1 waited for", "step 3", "step 2 waited for"]
    decoded = ["step 3 waited for", "decode", "step 4"]
    assert [each for each in card.log if "done" not in each] == [
        *("encode", *steps, *decoded),
        "step 4 waited for",
    ]


async def test_what_is_done_is_answered_though_no_call_follows(card: Card) -> None:
    card.thread.start()
    line = await connect(card.extension.address)
    waiting = line.call(encode_frame(("step 1",)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    card.log.append("step 1 done")
    async with asyncio.timeout(10):
        assert await waiting == "step 1"
    line.close()


async def test_a_fault_of_the_card_is_told_of_the_call_that_it_was_in(card: Card) -> None:
    line = await connect(card.extension.address)
    waiting = [line.call(encode_frame((name,))) for name in ("step 1", "fault", "encode")]
    card.thread.start()
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["step 1", "an illegal access", "encode"]
    line.close()


async def test_a_leader_that_is_gone_ends_a_rank_whose_card_works(card: Card) -> None:
    card.thread.start()
    line = await connect(card.extension.address)
    line.call(encode_frame(("step 1",)))
    await asyncio.sleep(0.05)
    line.close()
