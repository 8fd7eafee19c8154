"""The line between a leader and a rank: calls and answers over a socket.

Ray's own actor calls take five times as long, there and back, and the rank does nothing meanwhile;
from some megabytes on, theirs are the quicker ones. And Ray cancels the calls of a request that is
cancelled: on one rank only, perhaps, and the ranks would run different jobs from then on. Nothing
cancels what is in a socket. Between nodes it can be read by who sees their traffic, and is not
encrypted; who cannot prove to know its token is neither heard nor told anything.

How a leader and a rank believe each other, over a socket to which anybody may have connected.

Both know a token, which is never said: each proves that it knows it, of two numbers that are used
once, so that whoever listens can neither learn it nor say the same again. Rank: a number. Leader:
another one and its proof. Rank: its own proof. Nothing else is read or sent before.

Pickles that come over a line: of values of ours, and of nothing that runs.

A pickle may name any function of any module and have it called. Whoever has come between two nodes
is not to run code on both of them.
"""

import asyncio
import contextlib
import hmac
import io
import pickle
import secrets
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Protocol, runtime_checkable

from flux_ray import request
from flux_ray.errors import FluxError
from flux_ray.request import RgbImage

TOKEN_BYTES = 32
NUMBER_BYTES = 32
PROOF_BYTES = 32
# What a proof is made of besides: that of one end is none of the other's.
LEADER, RANK = b"flux-ray leader", b"flux-ray rank"


class Impostor(ConnectionError):
    """Who answers does not know the token."""


def proof_of(speaker: bytes, token: bytes, rank_number: bytes, leader_number: bytes) -> bytes:
    """What only who knows the token can say, and only in this meeting."""
    return hmac.digest(token, speaker + rank_number + leader_number, "sha256")


def is_leader(connection: socket.socket, token: bytes, patience_s: float) -> bool:
    """Say whether the leader has connected, and prove to it that this is its rank. Blocks.

    False for whoever is too slow or has left, too.
    """
    number = secrets.token_bytes(NUMBER_BYTES)
    end_s = time.monotonic() + patience_s
    try:
        connection.settimeout(patience_s)
        connection.sendall(number)
        said = received(connection, NUMBER_BYTES + PROOF_BYTES, end_s)
        leader_number, proof = said[:NUMBER_BYTES], said[NUMBER_BYTES:]
        if not hmac.compare_digest(proof, proof_of(LEADER, token, number, leader_number)):
            return False
        connection.sendall(proof_of(RANK, token, number, leader_number))
        connection.settimeout(None)
    except OSError:
        return False
    return True


def received(connection: socket.socket, num_bytes: int, end_s: float) -> bytes:
    """So many bytes; fewer where they do not come by then, however slowly some do."""
    said = b""
    with suppress(TimeoutError):
        while len(said) < num_bytes and (left_s := end_s - time.monotonic()) > 0:
            connection.settimeout(left_s)
            more = connection.recv(num_bytes - len(said))
            if not more:
                break
            said += more
    return said


async def meet_rank(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes
) -> None:
    """Prove to a rank that this is its leader. Raises Impostor if it is no rank of this leader's.

    EOFError if it hangs up.
    """
    rank_number = await reader.readexactly(NUMBER_BYTES)
    number = secrets.token_bytes(NUMBER_BYTES)
    writer.write(number + proof_of(LEADER, token, rank_number, number))
    proof = await reader.readexactly(PROOF_BYTES)
    if not hmac.compare_digest(proof, proof_of(RANK, token, rank_number, number)):
        raise Impostor("who answers for the rank does not know its token")


# The frozen values of requests and answers, and what makes an error of ours again.
ALLOWED = frozenset(
    (kind.__module__, name)
    for name, kind in vars(request).items()
    if isinstance(kind, type) and is_dataclass(kind)
) | {("flux_ray.errors", "revived"), ("flux_ray.replica.transport", "StageFailed")}


class LineUnpickler(pickle.Unpickler):
    """Makes what is allowed, besides numbers, texts, bytes, tuples, lists, sets and dicts."""

    def find_class(self, module: str, name: str) -> Any:
        """As pickle asks it; UnpicklingError for everything else."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not go over a line")
        return super().find_class(module, name)


def unpickled(data: bytes | bytearray, buffers: Iterable[bytes] = ()) -> Any:
    """Return the value of a pickle; UnpicklingError if it is none of a line's."""
    return LineUnpickler(io.BytesIO(data), buffers=buffers).load()


SIZE = struct.Struct("!Q")
# Of an answer: the bytes of its pickle, and how many buffers follow that.
ANSWER = struct.Struct("!QQ")
# A stranger that connects and falls silent holds up the leader for so long.
TOKEN_S = 5.0
# What a leader reads ahead: an answer may be an image's pixels, and of asyncio's 64 KiB they would
# be many small reads.
READ_BYTES = 2**22
# While the card works, a rank looks so often whether it is done, or another call is there.
POLL_MS = 1


class StageFailed(Exception):
    """What a rank tells its leader of an error that is no caller's mistake."""


@dataclass(frozen=True)
class Address:
    """Where a rank listens for its leader, and what both know, to believe each other."""

    host: str
    port: int
    token: bytes = field(repr=False)


def encode_frame(value: object) -> bytes:
    """A value as it goes over the line: its pickle, after the bytes that it has."""
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return SIZE.pack(len(data)) + data


class AnswerPickler(pickle.Pickler):
    """Leaves pixels where they are: they are sent as they lie in memory, after the pickle."""

    def reducer_override(self, value: object) -> Any:
        """As pickle asks it."""
        if isinstance(value, RgbImage):
            return RgbImage, (value.width, value.height, pickle.PickleBuffer(value.rgb))
        return NotImplemented


def answer_parts(value: object) -> Iterator[memoryview]:
    """Yield an answer as it goes over the line: its pickle, then each buffer after its size."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO(bytes(ANSWER.size))
    file.seek(ANSWER.size)
    AnswerPickler(file, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append).dump(value)
    head = file.getbuffer()
    ANSWER.pack_into(head, 0, len(head) - ANSWER.size, len(buffers))
    yield head
    for buffer in buffers:
        data = buffer.raw()
        yield memoryview(SIZE.pack(data.nbytes))
        yield data


async def read_answer(reader: asyncio.StreamReader) -> Any:
    """Return what `answer_parts` took apart; its buffers become the pixels as they were read."""
    num_bytes, num_buffers = ANSWER.unpack(await reader.readexactly(ANSWER.size))
    data = await reader.readexactly(num_bytes)
    buffers = [
        await reader.readexactly(*SIZE.unpack(await reader.readexactly(SIZE.size)))
        for _ in range(num_buffers)
    ]
    return unpickled(data, buffers)


@runtime_checkable
class Underway(Protocol):
    """What a call returns whose answer is not there yet: the card has still to do it."""

    def is_done(self) -> bool:
        """Whether `outcome` would not wait."""

    def outcome(self) -> object:
        """Wait for the answer and return it; StageFailed if it failed after all."""


class RankServer:
    """A rank's end. Nothing is unpickled before its leader has proved to know the token."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self.address = Address(
            host, self._socket.getsockname()[1], secrets.token_bytes(TOKEN_BYTES)
        )

    def answer(
        self, run: Callable[..., object], follows: Callable[..., bool] = lambda *call: False
    ) -> None:
        """Run the leader's calls, one after the other, until it is gone.

        A call that `follows` is begun while the one before it is under way, so that the card never
        waits for it; every other one when that is answered.
        """
        with self._meet_leader() as connection:
            self._socket.close()
            Dialogue(connection, run, follows).hold()

    def _meet_leader(self) -> socket.socket:
        while True:
            connection, _ = self._socket.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            if is_leader(connection, self.address.token, TOKEN_S):
                return connection
            connection.close()


class Dialogue:
    """Calls and their answers, in one order; at most one answer is due when a call is begun."""

    def __init__(
        self, connection: socket.socket, run: Callable[..., object], follows: Callable[..., bool]
    ) -> None:
        self._connection = connection
        self._run = run
        self._follows = follows
        self._underway: Underway | None = None
        self._more = select.poll()
        self._more.register(connection, select.POLLIN)

    def hold(self) -> None:
        """Return when the leader is gone."""
        while (call := self._next_call()) is not None:
            if not self._follows(*call):
                self._answer_former()
            outcome = outcome_of(self._run, call)
            self._answer_former()
            if isinstance(outcome, Underway):
                self._underway = outcome
            else:
                self._send(outcome)

    def _next_call(self) -> tuple[Any, ...] | None:
        """The next call; while there is none, what is done meanwhile is answered."""
        while self._underway is not None and not self._has_said_more():
            if self._underway.is_done():
                self._answer_former()
        header = self._receive(SIZE.size)
        if len(header) < SIZE.size:
            return None
        call: tuple[Any, ...] = unpickled(self._receive(*SIZE.unpack(header)))
        return call

    def _has_said_more(self) -> bool:
        return bool(self._more.poll(POLL_MS))

    def _receive(self, num_bytes: int) -> bytearray:
        """So many; less if the leader is gone."""
        data = bytearray(num_bytes)
        rest = memoryview(data)
        while rest and (num_read := self._connection.recv_into(rest)):
            rest = rest[num_read:]
        return data[: num_bytes - len(rest)] if rest else data

    def _answer_former(self) -> None:
        if self._underway is not None:
            underway, self._underway = self._underway, None
            self._send(outcome_of(underway.outcome, ()))

    def _send(self, outcome: object) -> None:
        for part in answer_parts(outcome):
            self._connection.sendall(part)


def outcome_of(run: Callable[..., object], call: tuple[object, ...]) -> object:
    """What it returned, or what it raised of what a leader is told."""
    try:
        return run(*call)
    except (FluxError, StageFailed) as error:
        return error


class RankConnection:
    """A leader's end: calls are answered in the order in which they were made.

    They are sent when the rank, which may not be at work yet, has proved to be this leader's.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes
    ) -> None:
        self._writer = writer
        self._token = token
        self._unsent: list[bytes] | None = []
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self.closed = asyncio.get_running_loop().create_task(self._listen(reader))

    def call(self, frame: bytes) -> asyncio.Future[Any]:
        """The answer to what `framed` a call's arguments; none comes once the line is closed."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        if self._unsent is not None:
            self._unsent.append(frame)
        elif not self._writer.is_closing():
            self._writer.write(frame)
        return answer

    def close(self) -> None:
        """The rank ends its work when it is done with what it was called for."""
        self._writer.close()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            await self._meet(reader)
            while True:
                outcome = await read_answer(reader)
                settle(self._waiting.popleft(), outcome)

    async def _meet(self, reader: asyncio.StreamReader) -> None:
        await meet_rank(reader, self._writer, self._token)
        unsent, self._unsent = self._unsent or [], None
        self._writer.writelines(unsent)


def settle(answer: asyncio.Future[Any], outcome: object) -> None:
    """Give it to whoever still waits for it."""
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


async def connect(address: Address) -> RankConnection:
    """The leader's end of a line to the rank that listens there."""
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=READ_BYTES)
    return RankConnection(reader, writer, address.token)
