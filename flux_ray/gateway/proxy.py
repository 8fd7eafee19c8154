"""What runs in Serve's proxies: how they read HTTP, for how long, and what they believe of it.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=flux_ray.gateway.proxy:read_with_h11`, where Ray starts.
"""

import asyncio

import h11
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.h11_impl import H11Protocol

from flux_ray.gateway.proxy_middleware import BegunBodies, LastReady, ProxyAnswers

# For a whole head, from the connection or from its first byte. Slow networks need one.
HEAD_S = 10.0
# For the rest of a body whose answer is out already: a client may read that only afterwards.
REST_S = 30.0
# In which a client takes nothing of an answer that waits for it: it is gone, or wants to keep it.
UNREAD_S = 60.0
# In one read, of 256 kB at most: a chunk of a body has two, and takes as long as a large one.
MAX_LINES = 8192
# Of a head that came at once. h11 has a limit for those only that come in pieces.
MAX_HEADERS, MAX_HEAD_BYTES = 128, 32 * 2**10
TOO_LARGE = f"at most {MAX_HEADERS} headers, of {MAX_HEAD_BYTES} bytes in all, are read"
# Of which a server in front may have believed the other one.
TWO_LENGTHS = "a body has a content-length or a transfer-encoding, not both"
# What Serve lets callers say of how it serves them, with `-` or `_`: it is not theirs to say.
NOT_CALLERS = (b"serve-multiplexed-model-id", b"x-request-disconnect-disabled")


def read_with_h11() -> list[Middleware]:
    """Have this process's HTTP read by h11, where uvicorn would take httptools.

    httptools takes what follows an offer to upgrade for another protocol: the body of every
    request of a JDK's HttpClient, which offers HTTP/2, is lost. And it keeps headers without end,
    before any key is asked; h11 takes 16 kB of them. Return what else requests go through.
    """
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{ImpatientProtocol.__name__}"
    # The last is the outermost: what it refuses is not taken for the end of a gateway.
    inside = [Middleware(LastReady), Middleware(BegunBodies)]
    return [*inside, Middleware(ProxyAnswers), Middleware(PlainHeaders)]


class ImpatientProtocol(H11Protocol):
    """Closes connections on which nothing happens that should.

    uvicorn itself does so after an answer only, and not if a single byte has come since.
    """

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The head of a first request is to come."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """A head may have become whole, or another one may have begun."""
        if data.count(b"\r\n") > MAX_LINES:
            self.transport.abort()
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """uvicorn waits for the next head; a body may still be coming."""
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:
            self._watch()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered, or not at all."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        stop(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(exc)
        stop(self._head)
        stop(self._unread)

    def _expect_reading(self) -> None:
        num_bytes = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(UNREAD_S, self._check_reading, num_bytes)

    def _check_reading(self, num_bytes: int) -> None:
        """A large answer may take a slow client long, as long as it takes some of it."""
        if self.transport.get_write_buffer_size() < num_bytes:
            self._expect_reading()
        else:
            self.transport.abort()

    def _watch(self) -> None:
        """Give the client its time, once for each thing that it is to send."""
        is_resting = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if self.conn.their_state is not h11.IDLE and not is_resting:
            stop(self._head)
            self._head = None
        elif self._head is None and not self.transport.is_closing():
            limit_s = REST_S if is_resting else HEAD_S
            self._head = self.loop.call_later(limit_s, self.transport.abort)


def stop(timer: asyncio.TimerHandle | None) -> None:
    """Cancel the timer, if there is one."""
    if timer is not None:
        timer.cancel()


class PlainHeaders:
    """Middleware: heads are not too large, and tell Serve nothing that is not callers' to say."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            sent = scope["headers"]
            num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
            num_bytes += sum(len(name) + len(value) for name, value in sent)
            if len(sent) > MAX_HEADERS or num_bytes > MAX_HEAD_BYTES:
                await PlainTextResponse(TOO_LARGE, 431)(scope, receive, send)
                return
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in sent}:
                answer = PlainTextResponse(TWO_LENGTHS, 400, {"connection": "close"})
                await answer(scope, receive, send)
                return
            theirs = [each for each in sent if each[0].replace(b"_", b"-") not in NOT_CALLERS]
            scope = {**scope, "headers": theirs}
        await self.app(scope, receive, send)
