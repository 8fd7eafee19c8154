"""Handle HTTP below the dialects: body limits, packed bodies, request ids, event streams.

`BodyLimit` reads no more of a body than the gateway allows and has memory for. `Unpacking` inflates
gzip and deflate bodies piece by piece, before `BodyLimit` counts them. `RequestId` gives every
request an id: the client's own, else a new one. Serve's proxy would make one in a form that cannot
be told from a client's, so our part of the proxy (proxy_middleware.py) sets it first.

Server-sent events begin at once and never pause for long: proxies and load balancers cut a
connection that is silent for a minute, and a tier that starts from no replica takes longer.
"""

import asyncio
import re
import uuid
import zlib
from collections.abc import AsyncGenerator, Callable

from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.config import Limits
from flux_ray.errors import BadRequest, BodyTooLarge, WrongEncoding
from flux_ray.gateway.memory_budget import MEMORY, Share

# Python refuses to parse numbers of thousands of digits.
MAX_DIGITS = 18
# How often a body is in memory: JSON as it came and as the texts that were parsed from it. Form
# files are on disk beyond a megabyte each, and are read into memory one by one.
JSON_COPIES, FORM_COPIES = 2, 1
# The attribute of a request's state with the body's share of the memory budget.
SHARE = "body_share"


class BodyLimit:
    """Middleware that raises BodyTooLarge or Overloaded while a body is read.

    If the client states the length, it is judged before the first byte is read. What was read
    counts in the memory budget until the answer is sent, or until the route calls `forget_body`.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        share = MEMORY.share(self.limits.max_kept_bytes)
        scope.setdefault("state", {})[SHARE] = share
        try:
            await self.app(scope, self.limited(Headers(scope=scope), share, receive), send)
        finally:
            share.release()

    def limited(self, headers: Headers, share: Share, receive: Receive) -> Receive:
        """Return a `receive` that passes messages on while they are within the limits."""
        told, copies = told_bytes(headers, self.limits.max_body_bytes), copies_of(headers)
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            # Here rather than before the route runs: errors raised from its reading reach the error
            # handlers.
            self.check(told)
            message = await receive()
            num_arrived = len(message.get("body", b""))
            if num_arrived and not num_bytes:
                MEMORY.check_room(max(told, num_arrived) * copies, self.limits.max_kept_bytes)
            num_bytes += num_arrived
            self.check(num_bytes)
            share.grow(num_arrived * copies)
            return message

        return receive_limited

    def check(self, num_bytes: int) -> None:
        """Raise BodyTooLarge if a body of so many bytes is not read."""
        if num_bytes > self.limits.max_body_bytes:
            raise BodyTooLarge(f"the body is larger than {self.limits.max_body_bytes} bytes")


def told_bytes(headers: Headers, max_bytes: int) -> int:
    """Return the content length that the client states, 0 if none.

    Return `max_bytes` + 1 if the number is so long that it is not worth parsing.
    """
    told = headers.get("content-length", "")
    if not told.isdecimal():
        return 0
    return int(told) if len(told) <= MAX_DIGITS else max_bytes + 1


def copies_of(headers: Headers) -> int:
    """Return how many times a body of this content type is in memory."""
    is_form = headers.get("content-type", "").lower().startswith("multipart/")
    return FORM_COPIES if is_form else JSON_COPIES


def forget_body(request: Request) -> None:
    """Take the body out of the memory budget; call this once nothing of it is in memory."""
    share: Share = getattr(request.state, SHARE)
    share.release()


async def read_body(request: Request) -> bytes:
    """Return the whole body. Unlike `request.body()`, do not keep it until the answer is sent."""
    return b"".join([chunk async for chunk in request.stream()])


MEDIA_TYPE = "text/event-stream"
HEADERS = {
    # Proxies must not cache, pack or buffer the events.
    "cache-control": "no-store, no-transform",
    "x-accel-buffering": "no",
}
# Errors before this are answered with their own HTTP status; later the stream has begun with a 200.
HOLD_S = 0.3
HEARTBEAT_S = 5.0


def event_text(name: str, data: BaseModel) -> str:
    """Return a server-sent event as it goes over the wire.

    The data are ASCII: some clients split lines at characters that the standard does not treat as
    line ends, such as U+2028.
    """
    written = data.model_dump_json(exclude_none=True, ensure_ascii=True)
    return f"event: {name}\ndata: {written}\n\n"


def comment_text(words: str) -> str:
    """Return a comment, which every client skips."""
    return f": {words}\n\n"


async def kept_alive(
    texts: AsyncGenerator[str, None], words: Callable[[], str]
) -> AsyncGenerator[str, None]:
    """Yield `texts`, and a comment of `words()` whenever nothing came for HEARTBEAT_S.

    The first comment comes after HOLD_S. Closing this generator closes `texts`.
    """
    patience_s = HOLD_S
    coming: asyncio.Future[str] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(texts))
            done, _ = await asyncio.wait((coming,), timeout=patience_s)
            patience_s = HEARTBEAT_S
            if not done:
                yield comment_text(words())
                continue
            came, coming = coming, None
            try:
                text = came.result()
            except StopAsyncIteration:
                return
            yield text
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await texts.aclose()


HEADER = "x-request-id"
_USABLE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# As long as a UUID, but not a valid one: clients that send UUIDs cannot send one of ours.
_OURS = re.compile(r"flux[0-9a-f]{28}")


class RequestId:
    """Middleware that sets `request.state.request_id` and the answer's `x-request-id`.

    `proxy_sends_id`: the proxy in front sets the header, so that a second one here would be too
    many.
    """

    def __init__(self, app: ASGIApp, *, proxy_sends_id: bool) -> None:
        self.app = app
        self.proxy_sends_id = proxy_sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_for(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start" and not self.proxy_sends_id:
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


def request_id_for(headers: Headers) -> str:
    """Return the client's id if it is short and safe to log, else a new one."""
    sent = headers.get(HEADER, "")
    return sent if _USABLE.fullmatch(sent) else new_request_id()


def new_request_id() -> str:
    """Return an id for a request whose client sent none."""
    return f"flux{uuid.uuid4().hex[4:]}"


def is_ours(request_id: str) -> bool:
    """Return whether the id was made here, because the client sent none."""
    return _OURS.fullmatch(request_id) is not None


# The encodings that can be read, as an answer of 415 names them (RFC 7694).
READABLE = "gzip, deflate, identity"
GZIP = ("gzip", "x-gzip")
# zlib's window bits for gzip, for deflate as HTTP defines it, and for raw deflate, which some
# clients send instead.
GZIP_BITS, DEFLATE_BITS, RAW_BITS = 31, 15, -15
# The largest unpacked piece. The body can be refused after each, before a few kB of zeros have
# become gigabytes.
PIECE_BYTES = 2**20
# One gzip stream is usual; packers that work in parallel write several. An empty one takes 20 bytes
# and as much work as any other.
MAX_STREAMS = 100


class Unpacking:
    """Middleware that unpacks gzip and deflate bodies for everything inside of it."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encodings = encodings_of(Headers(scope=scope)) if scope["type"] == "http" else []
        if encodings:
            receive = PackedBody(receive, encodings, self.max_body_bytes).receive
            headers = [each for each in scope["headers"] if is_of_content(each)]
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, send)


def encodings_of(headers: Headers) -> list[str]:
    """Return the content encodings in the order in which they were applied."""
    names = ",".join(headers.getlist("content-encoding")).lower().split(",")
    return [name.strip() for name in names if name.strip() not in ("", "identity")]


def is_of_content(header: tuple[bytes, bytes]) -> bool:
    """Return whether a header still holds for the unpacked body."""
    return header[0].lower() not in (b"content-encoding", b"content-length")


class PackedBody:
    """One packed body. Errors are raised to the route that reads it, which answers them."""

    def __init__(self, receive: Receive, encodings: list[str], max_bytes: int) -> None:
        self._receive = receive
        self._encodings = encodings
        self._max_bytes = max_bytes
        self._num_packed = self._num_streams = 0
        self._waiting = b""
        # None before the first packed stream and between two.
        self._inflater: zlib._Decompress | None = None
        self._may_have_more = False
        self._is_last = False
        self._is_over = False

    async def receive(self) -> Message:
        """Return the next unpacked piece, or after the body whatever the server sends."""
        if self._is_over:
            return await self._receive()
        self._check_encodings()
        while True:
            if self._waiting or self._may_have_more:
                piece = await asyncio.to_thread(self._unpack)
                if piece:
                    return {"type": "http.request", "body": piece, "more_body": True}
            elif self._is_last:
                return self._end()
            else:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._take(message)

    def _check_encodings(self) -> None:
        if len(self._encodings) == 1 and self._encodings[0] in (*GZIP, "deflate"):
            return
        packed = ", ".join(self._encodings)[:80]
        raise WrongEncoding(
            f"content-encoding {packed} is not read: send the body plain, or as gzip or deflate",
            "content-encoding",
        )

    def _take(self, message: Message) -> None:
        self._waiting = message.get("body", b"")
        self._is_last = not message.get("more_body", False)
        self._num_packed += len(self._waiting)
        if self._num_packed > self._max_bytes:
            raise BodyTooLarge(f"the body is larger than {self._max_bytes} bytes")

    def _end(self) -> Message:
        if self._inflater is not None:
            raise BadRequest(f"the body is not whole: its {self._encodings[0]} stream is cut")
        self._is_over = True
        return {"type": "http.request", "body": b"", "more_body": False}

    def _unpack(self) -> bytes:
        """Unpack the next piece of what has arrived."""
        try:
            if self._inflater is None:
                return self._begin()
            return self._inflate(self._inflater)
        except zlib.error:
            raise BadRequest(f"the body is no {self._encodings[0]}") from None

    def _begin(self) -> bytes:
        """Unpack the first piece of a stream; a gzip body may have several."""
        self._num_streams += 1
        if self._num_streams > MAX_STREAMS:
            raise BadRequest(f"the body has more than {MAX_STREAMS} gzip streams")
        if self._encodings[0] in GZIP:
            return self._inflate(zlib.decompressobj(GZIP_BITS))
        try:
            return self._inflate(zlib.decompressobj(DEFLATE_BITS))
        except zlib.error:
            return self._inflate(zlib.decompressobj(RAW_BITS))

    def _inflate(self, inflater: "zlib._Decompress") -> bytes:
        piece = inflater.decompress(self._waiting, PIECE_BYTES)
        self._inflater = None if inflater.eof else inflater
        self._waiting = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        self._may_have_more = not inflater.eof and len(piece) == PIECE_BYTES
        return piece
