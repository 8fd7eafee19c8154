"""The connection between a leader and a rank: calls and their answers over a socket.

Ray's actor calls take five times as long, there and back, while the rank is idle (they are faster
only from some megabytes on). And Ray cancels the calls of a cancelled request, perhaps on one rank
only, after which the ranks would run different jobs. What is in a socket, nothing cancels.

Anybody may connect to the socket, so each end first proves to the other that it knows a token,
which the leader got through Ray. The token itself is never sent. The rank sends a random number;
the leader sends one of its own, and an HMAC of both; the rank sends another HMAC of both. Whoever
listens can neither learn the token from this nor use it again. Before that, nothing else is read or
sent. The traffic is not encrypted: between nodes, whoever sees it can read it.

A pickle can have any function of any module called. So only the values in `ALLOWED` are unpickled,
and whoever gets between two nodes still cannot run code on them.
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

from flux_ray import request, stages
from flux_ray.errors import FluxError
from flux_ray.request import RgbImage

TOKEN_BYTES = 32
NUMBER_BYTES = 32
PROOF_BYTES = 32
# The proof of each end begins with its name, so that it cannot be sent back as the other's.
LEADER, RANK = b"flux-ray leader", b"flux-ray rank"


class Impostor(ConnectionError):
    """The other end of the connection does not know the token."""


def proof_of(speaker: bytes, token: bytes, rank_number: bytes, leader_number: bytes) -> bytes:
    """Return the 32 bytes by which `speaker` proves to know the token, on this connection only."""
    return hmac.digest(token, speaker + rank_number + leader_number, "sha256")


def is_leader(connection: socket.socket, token: bytes, patience_s: float) -> bool:
    """Return whether it is the leader that has connected, and prove to it that this is its rank.

    Block for up to `patience_s` seconds. Return False too if the other end is too slow or has left.
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
        # From here on there is no limit: the leader's calls may be hours apart.
        connection.settimeout(None)
    except OSError:
        return False
    return True


def received(connection: socket.socket, num_bytes: int, end_s: float) -> bytes:
    """Receive `num_bytes`, or fewer if they have not come by `end_s` of the monotonic clock.

    The limit is for all of them together, since a stranger may send a byte now and then.
    """
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
    """Prove to a rank that this is its leader, and check that it is the rank.

    Raise Impostor if it does not know the token, and EOFError if it closes the connection.
    """
    rank_number = await reader.readexactly(NUMBER_BYTES)
    number = secrets.token_bytes(NUMBER_BYTES)
    writer.write(number + proof_of(LEADER, token, rank_number, number))
    proof = await reader.readexactly(PROOF_BYTES)
    if not hmac.compare_digest(proof, proof_of(RANK, token, rank_number, number)):
        raise Impostor("who answers for the rank does not know its token")


# The dataclasses of requests and answers, and what pickles of our errors name.
ALLOWED = frozenset(
    (kind.__module__, name)
    for name, kind in (vars(request) | vars(stages)).items()
    if isinstance(kind, type) and is_dataclass(kind)
) | {("flux_ray.errors", "revived"), ("flux_ray.replica.transport", "StageFailed")}


class LineUnpickler(pickle.Unpickler):
    """An unpickler of the values in ALLOWED and of Python's plain types, and of nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class for pickle; raise UnpicklingError for one that is not in ALLOWED."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not go over a line")
        return super().find_class(module, name)


def unpickled(data: bytes | bytearray, buffers: Iterable[bytes] = ()) -> Any:
    """Return the value of a pickle; raise UnpicklingError if it names what is not in ALLOWED."""
    return LineUnpickler(io.BytesIO(data), buffers=buffers).load()


SIZE = struct.Struct("!Q")
# The header of an answer: the bytes of its pickle, and the number of buffers that follow it.
ANSWER = struct.Struct("!QQ")
# Seconds for the proof. A stranger that connects and says nothing keeps the leader waiting so long.
TOKEN_S = 5.0
# Bytes that a leader reads ahead: an answer may hold an image's pixels, which would be many small
# reads with asyncio's 64 KiB.
READ_BYTES = 2**22
# How often a rank looks whether the GPU is done, while no further call has come.
POLL_MS = 1


class StageFailed(Exception):
    """An error on a rank that is no caller's mistake, in one line of text for its leader."""


@dataclass(frozen=True)
class Address:
    """Where a rank listens for its leader, and the token by which they recognise each other."""

    host: str
    port: int
    token: bytes = field(repr=False)


def encode_frame(value: object) -> bytes:
    """Return a call as it is sent: the number of bytes of its pickle, then the pickle."""
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return SIZE.pack(len(data)) + data


class AnswerPickler(pickle.Pickler):
    """A pickler that leaves pixels out, to be sent from where they are, without a copy."""

    def reducer_override(self, value: object) -> Any:
        """Return, for pickle, how to rebuild an image around a buffer of its pixels."""
        if isinstance(value, RgbImage):
            return RgbImage, (value.width, value.height, pickle.PickleBuffer(value.rgb))
        return NotImplemented


def answer_parts(value: object) -> Iterator[memoryview]:
    """Yield the parts of an answer as it is sent: header and pickle, then size and each buffer."""
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
    """Read an answer that was sent as `answer_parts`; its pixels are the buffers, not copied."""
    num_bytes, num_buffers = ANSWER.unpack(await reader.readexactly(ANSWER.size))
    data = await reader.readexactly(num_bytes)
    buffers = [
        await reader.readexactly(*SIZE.unpack(await reader.readexactly(SIZE.size)))
        for _ in range(num_buffers)
    ]
    return unpickled(data, buffers)


@runtime_checkable
class Underway(Protocol):
    """The result of a call that the GPU has still to work on; `timer.Launched` is one."""

    def is_done(self) -> bool:
        """Return whether `outcome` would return without waiting."""

    def outcome(self) -> object:
        """Wait for the answer and return it; raise StageFailed if the GPU failed."""


class RankServer:
    """A rank's end: it listens, lets in one leader, and answers its calls on one thread.

    Nothing is unpickled before the leader has proved to know the token.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self.address = Address(
            host, self._socket.getsockname()[1], secrets.token_bytes(TOKEN_BYTES)
        )

    def answer(
        self, run: Callable[..., object], follows: Callable[..., bool] = lambda *call: False
    ) -> None:
        """Wait for the leader, then run its calls one after the other until it is gone.

        `follows` says whether a call may begin while the GPU still works on the one before it, so
        that the GPU need not wait for it. Every other call begins when that one is answered.
        """
        with self._meet_leader() as connection:
            # A rank has one leader all its life: nobody else may connect.
            self._socket.close()
            Dialogue(connection, run, follows).hold()

    def _meet_leader(self) -> socket.socket:
        while True:
            connection, _ = self._socket.accept()
            # Otherwise the end of an answer may wait until the leader has acknowledged its start.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            if is_leader(connection, self.address.token, TOKEN_S):
                return connection
            connection.close()


class Dialogue:
    """The calls on one connection, answered in their order, with at most one call under way."""

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
        """Run calls and send their answers until the leader is gone."""
        while (call := self._next_call()) is not None:
            if not self._follows(*call):
                self._answer_former()
            outcome = outcome_of(self._run, call)
            # Leaders take answers in the order of their calls.
            self._answer_former()
            if isinstance(outcome, Underway):
                self._underway = outcome
            else:
                self._send(outcome)

    def _next_call(self) -> tuple[Any, ...] | None:
        """Return the next call, or None if the leader is gone.

        While there is none, send the answer to the call that is under way as soon as it is done.
        """
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
        """Return the next `num_bytes`, or fewer if the leader is gone."""
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
    """Return what `run` returns, or the error that it raises if that may be sent to a leader."""
    try:
        return run(*call)
    except (FluxError, StageFailed) as error:
        return error


class RankConnection:
    """A leader's end, used on its event loop: calls are answered in the order they were made.

    Calls are kept until the rank has proved to know the token: it may not be at work yet. `closed`
    is a task that ends when the connection does.
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
        """Send a call, encoded by `encode_frame`, and return the future of its answer.

        The future stays pending if the connection is closed; watch `closed` besides.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        if self._unsent is not None:
            self._unsent.append(frame)
        elif not self._writer.is_closing():
            self._writer.write(frame)
        return answer

    def close(self) -> None:
        """Close the connection; the rank still runs the calls it has received, then ends."""
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
    """Set the future of an answer to its value or error, unless it was cancelled."""
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


async def connect(address: Address) -> RankConnection:
    """Connect to the rank that listens at `address`, and return the leader's end."""
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=READ_BYTES)
    return RankConnection(reader, writer, address.token)
