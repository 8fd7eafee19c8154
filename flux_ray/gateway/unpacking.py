"""Bodies that were packed on their way: gzip and deflate are unpacked, a piece at a time."""

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.errors import BadRequest, BodyTooLarge, WrongEncoding

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
