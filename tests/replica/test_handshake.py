"""Who is believed on a line, and what may come over it, once it is."""

import asyncio
import contextlib
import os
import pickle
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ray import errors
from flux_ray.errors import FluxError, Overloaded, QuotaSpent
from flux_ray.replica import transport as handshake
from flux_ray.replica.transport import (
    ALLOWED,
    LEADER,
    NUMBER_BYTES,
    PROOF_BYTES,
    Address,
    Impostor,
    StageFailed,
    answer_parts,
    connect,
    encode_frame,
    is_leader,
    meet_rank,
    proof_of,
    unpickled,
)
from flux_ray.request import Encoding, ImageRequest, Mask, RgbImage
from flux_ray.stages import DenoisedImage, Encoded, EncodedPrompt, PackedTensor, StageAnswer
from tests.listening import listening

TOKEN = secrets.token_bytes(handshake.TOKEN_BYTES)
PATIENCE_S = 5.0


@contextlib.contextmanager
def rank_waiting(token: bytes = TOKEN, patience_s: float = PATIENCE_S):
    """A socket to a rank, and what it came to believe of whoever is at its other end."""
    ours, theirs = socket.socketpair()
    believed: list[bool] = []
    thread = threading.Thread(
        target=lambda: believed.append(is_leader(theirs, token, patience_s)), daemon=True
    )
    thread.start()
    with ours, theirs:
        yield ours, lambda: thread.join(10) or believed[0]


async def leader_at(stranger: socket.socket, token: bytes) -> None:
    reader, writer = await asyncio.open_connection(sock=stranger.dup())
    try:
        await meet_rank(reader, writer, token)
    finally:
        writer.close()


async def test_who_knows_the_token_is_believed_and_the_token_is_not_said():
    with rank_waiting() as (ours, is_believed):
        await leader_at(ours, TOKEN)
        assert await asyncio.to_thread(is_believed)
    number = secrets.token_bytes(NUMBER_BYTES)
    assert TOKEN not in proof_of(LEADER, TOKEN, number, number)


async def test_who_knows_another_token_is_not():
    with rank_waiting() as (ours, is_believed):
        leader = asyncio.create_task(leader_at(ours, b"another token"))
        assert not await asyncio.to_thread(is_believed)
        ours.shutdown(socket.SHUT_RDWR)
        with pytest.raises(EOFError):
            await leader


async def test_what_was_heard_once_convinces_nobody_again():
    with rank_waiting() as (ours, is_believed):
        number = ours.recv(NUMBER_BYTES)
        said = bytes(NUMBER_BYTES) + proof_of(LEADER, TOKEN, number, bytes(NUMBER_BYTES))
        ours.sendall(said)
        assert len(ours.recv(PROOF_BYTES)) == PROOF_BYTES
        assert await asyncio.to_thread(is_believed)
    with rank_waiting() as (ours, is_believed):
        ours.recv(NUMBER_BYTES)
        ours.sendall(said)
        assert not await asyncio.to_thread(is_believed)


@given(st.binary(max_size=2 * NUMBER_BYTES + 64))
def test_nothing_that_a_stranger_says_is_believed(said):
    with rank_waiting() as (ours, is_believed):
        ours.sendall(said)
        ours.shutdown(socket.SHUT_WR)
        assert not is_believed()


def test_who_says_a_byte_now_and_then_holds_up_nobody_for_longer():
    with rank_waiting(patience_s=0.3) as (ours, is_believed):
        done = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not done.wait(0.05):
                    ours.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert not is_believed()
        done.set()
        dripping.join()


@pytest.fixture
async def impostor() -> AsyncIterator[tuple[Address, list[bytes], asyncio.Event]]:
    """It has the rank's port, not its token, and says the leader's own proof back to it."""
    heard: list[bytes] = []
    hung_up = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(NUMBER_BYTES))
        said = await reader.readexactly(NUMBER_BYTES + PROOF_BYTES)
        writer.write(said[NUMBER_BYTES:])
        heard.append(await reader.read())
        hung_up.set()
        writer.close()

    async with listening(answer) as port:
        yield Address("127.0.0.1", port, TOKEN), heard, hung_up


async def test_a_leader_says_nothing_to_who_is_not_its_rank(impostor):
    address, heard, hung_up = impostor
    line = await connect(address)
    line.call(encode_frame(("a secret prompt",)))
    async with asyncio.timeout(10):
        await line.closed
        line.close()
        await hung_up.wait()
    assert heard == [b""]
    assert issubclass(Impostor, ConnectionError)


RASTER = RgbImage(2, 1, b"abcdef")
VALUES = [
    (1, ("encode", "prepare"), ImageRequest("r", "tiny", "words", 64, 64, 4, 1.0, 7)),
    ImageRequest(
        *("r", "tiny", "w", 64, 64, 4, 1.0, 7),
        references=(RASTER,),
        mask=Mask(2, 1, b"ab"),
        encoding=Encoding("jpeg", 80, (32, 32)),
    ),
    EncodedPrompt((("embeds", PackedTensor(b"data", (1, 4), "bfloat16")),), ("a warning",)),
    [StageAnswer(Encoded((), True), 0.5), StageAnswer(DenoisedImage(RASTER, 7), 1.0)],
    None,
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_what_a_line_is_for_goes_over_it(value):
    assert RASTER.digest, "which is kept in it"
    assert unpickled(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)) == value


@pytest.mark.parametrize("error", [Overloaded("later", None, 3), StageFailed("KeyError: 'x'")])
def test_errors_of_ours_go_over_it(error):
    assert repr(unpickled(pickle.dumps(error))) == repr(error)


def test_every_error_of_ours_goes_over_it():
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    for kind in kinds:
        if issubclass(kind, FluxError):
            assert type(unpickled(pickle.dumps(kind("words", "field")))) is kind
    assert QuotaSpent in kinds


def harm(path: str) -> None:
    """What a stranger would have called."""


class Harmful:
    def __init__(self, call: Callable[..., object], *args: object) -> None:
        self.reduced = call, args

    def __reduce__(self) -> object:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "value",
    [
        Harmful(os.system, "touch harm"),
        Harmful(eval, "1"),
        Harmful(getattr, "a text", "format"),
        Harmful(harm, "x"),
        StageAnswer(Harmful(os.getcwd), 0.0),
        [Harmful(bytearray, 10)],
        os.getcwd,
    ],
    # Their words have addresses in them, and two processes would not know them as the same tests.
    ids=["system", "eval", "getattr", "ours", "in an answer", "in a list", "a function"],
)
def test_nothing_that_runs_goes_over_it(value, protocol):
    with pytest.raises(pickle.UnpicklingError, match="does not go over a line"):
        unpickled(pickle.dumps(value, protocol))


def test_what_is_allowed_is_known_by_its_name():
    assert ("flux_ray.request", "ImageRequest") in ALLOWED
    assert {module for module, _ in ALLOWED} == {
        "flux_ray.request",
        "flux_ray.stages",
        "flux_ray.errors",
        "flux_ray.replica.transport",
    }


def test_pixels_come_from_the_buffers_beside_the_pickle():
    head, size, data = answer_parts(RASTER)
    assert bytes(data) == RASTER.rgb
    assert unpickled(bytes(head[16:]), [bytes(data)]) == RASTER
    assert len(size) == 8
