"""Bodies that were packed on their way: gzip and deflate are unpacked, a piece at a time.

No more of a request's body is read than the gateway allows.

Server-sent events that begin at once and are never silent for long.

Proxies and load balancers cut a connection on which nothing has come for a minute, and a tier that
starts from no replica takes longer than that.

Every HTTP request has an id: the client's own, else a new one; answers bear it.

Serve's proxy makes one where the client sends none, and nobody can tell then whose it is: so our
part of the proxy (proxy_answers.py) makes it before, in a form of its own.
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

from flux_ray.config.gateway import Limits
from flux_ray.errors import BadRequest, BodyTooLarge, WrongEncoding
from flux_ray.gateway.memory_budget import MEMORY, Share

# Python refuses to read numbers of thousands of digits.
MAX_DIGITS = 18
# JSON is in memory as it came, and as the texts that were read from it. Files of a form are on the
# disk, but for a megabyte each, and then in memory one by one.
JSON_COPIES, FORM_COPIES = 2, 1
# Of a request's state: what its body holds of the budget.
SHARE = "body_share"


class BodyLimit:
    """Middleware: reading too large a body raises, before it is read where its length is told.

    So does one for which the gateway has no room. What was read is in the budget until the answer
    is out, or until the route says that it is through with it.
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
        """The same messages, within the limits."""
        told, copies = told_bytes(headers, self.limits.max_body_bytes), copies_of(headers)
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
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
        """Raised from the route's own reading, so that it is answered as every error is."""
        if num_bytes > self.limits.max_body_bytes:
            raise BodyTooLarge(f"the body is larger than {self.limits.max_body_bytes} bytes")


def told_bytes(headers: Headers, max_bytes: int) -> int:
    """The length that the client says; more than `max_bytes` where it is not worth reading."""
    told = headers.get("content-length", "")
    if not told.isdecimal():
        return 0
    return int(told) if len(told) <= MAX_DIGITS else max_bytes + 1


def copies_of(headers: Headers) -> int:
    """How many times a body of that type is in memory."""
    is_form = headers.get("content-type", "").lower().startswith("multipart/")
    return FORM_COPIES if is_form else JSON_COPIES


def forget_body(request: Request) -> None:
    """Give back what the body holds of the budget: nothing of it is in memory any more."""
    share: Share = getattr(request.state, SHARE)
    share.release()


async def read_body(request: Request) -> bytes:
    """The whole body, which the request does not keep for as long as it is answered."""
    return b"".join([chunk async for chunk in request.stream()])


MEDIA_TYPE = "text/event-stream"
HEADERS = {
    # Nobody on the way is to keep the events, to pack them, or to collect them first.
    "cache-control": "no-store, no-transform",
    "x-accel-buffering": "no",
}
# What is refused sooner is answered with the status of its error.
HOLD_S = 0.3
HEARTBEAT_S = 5.0


def event_text(name: str, data: BaseModel) -> str:
    """Return an event as it goes over the wire.

    In ASCII: clients cut lines by their language's rules, which know more signs than the standard.
    """
    written = data.model_dump_json(exclude_none=True, ensure_ascii=True)
    return f"event: {name}\ndata: {written}\n\n"


def comment_text(words: str) -> str:
    """Return a comment, which every client skips."""
    return f": {words}\n\n"


async def kept_alive(
    texts: AsyncGenerator[str, None], words: Callable[[], str]
) -> AsyncGenerator[str, None]:
    """Yield `texts`, and a comment of `words()` whenever none has come for a heartbeat.

    The first comment comes after HOLD_S. Close it, and `texts` is closed.
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
# As long as a UUID, and none.
_OURS = re.compile(r"flux[0-9a-f]{28}")


class RequestId:
    """Middleware: the id is in `request.state.request_id` and in the answer's header."""

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
    """The client's id if it is short and plain, for it goes into logs."""
    sent = headers.get(HEADER, "")
    return sent if _USABLE.fullmatch(sent) else new_request_id()


def new_request_id() -> str:
    """For a client that sends none."""
    return f"flux{uuid.uuid4().hex[4:]}"


def is_ours(request_id: str) -> bool:
    """Whether its client sent none."""
    return _OURS.fullmatch(request_id) is not None


# What an answer of 415 says that could be read (RFC 7694).
READABLE = "gzip, deflate, identity"
GZIP = ("gzip", "x-gzip")
# zlib's window bits: of gzip, of deflate as HTTP has it, and as some clients send it.
GZIP_BITS, DEFLATE_BITS, RAW_BITS = 31, 15, -15
# Whoever counts the bytes may stop after each: a thousandth as many may have been sent.
PIECE_BYTES = 2**20
# One is usual, and packers that work in parts make some; an empty one is 20 bytes, and work as any.
MAX_STREAMS = 100


class Unpacking:
    """Middleware: whoever reads and counts a body's bytes inside of this sees them unpacked."""

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
    """Return how the body was packed, in the order in which that was done."""
    names = ",".join(headers.getlist("content-encoding")).lower().split(",")
    return [name.strip() for name in names if name.strip() not in ("", "identity")]


def is_of_content(header: tuple[bytes, bytes]) -> bool:
    """Whether a header is true of the unpacked body, too."""
    return header[0].lower() not in (b"content-encoding", b"content-length")


class PackedBody:
    """Unpacks one body. Errors are raised to whoever reads it, and answered as every error is."""

    def __init__(self, receive: Receive, encodings: list[str], max_bytes: int) -> None:
        self._receive = receive
        self._encodings = encodings
        self._max_bytes = max_bytes
        self._num_packed = self._num_streams = 0
        self._waiting = b""
        # Within a packed stream; None before it and between two.
        self._inflater: zlib._Decompress | None = None
        self._may_have_more = False
        self._is_last = False
        self._is_over = False

    async def receive(self) -> Message:
        """Return the next unpacked piece, or what the server has to say after the body."""
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
        """Unpack what waits, as far as one piece."""
        try:
            if self._inflater is None:
                return self._begin()
            return self._inflate(self._inflater)
        except zlib.error:
            raise BadRequest(f"the body is no {self._encodings[0]}") from None

    def _begin(self) -> bytes:
        """Unpack the first piece of a stream; of gzip, one may follow another."""
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
