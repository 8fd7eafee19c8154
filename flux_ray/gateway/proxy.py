"""Set up Serve's HTTP proxies: which parser and middleware they use, and how long they wait.

Set `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=flux_ray.gateway.proxy:read_with_h11` where Ray
starts; each proxy then calls `read_with_h11` once.
"""

import asyncio

import h11
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.h11_impl import H11Protocol

from flux_ray.gateway.proxy_middleware import BegunBodies, LastReady, ProxyAnswers, ProxyTraces
from flux_ray.gateway.request_log import watch_requests

# Seconds for a complete request head, from the connection or from the head's first byte. Slow
# networks need one of them.
HEAD_S = 10.0
# Seconds for the rest of a body whose answer was already sent: some clients read the answer only
# after they have sent everything.
REST_S = 30.0
# A client that reads nothing of a waiting answer for so many seconds is gone, or keeps it on
# purpose.
UNREAD_S = 60.0
# Line ends in one read of at most 256 kB. A chunk of a body has two however small it is, and costs
# as much time as a large one.
MAX_LINES = 8192
# h11 itself limits only heads that come in pieces; this is for those that come at once.
MAX_HEADERS, MAX_HEAD_BYTES = 128, 32 * 2**10
TOO_LARGE = f"at most {MAX_HEADERS} headers, of {MAX_HEAD_BYTES} bytes in all, are read"
# Of two lengths, a server in front may believe the other one and see another request (smuggling).
TWO_LENGTHS = "a body has a content-length or a transfer-encoding, not both"
# Serve obeys these headers, with `-` or `_` in their names; callers have no say in that.
NOT_CALLERS = (b"serve-multiplexed-model-id", b"x-request-disconnect-disabled")


def read_with_h11() -> list[Middleware]:
    """Make this process read HTTP with h11 instead of httptools; return the proxy's middleware.

    After an offer to upgrade, httptools takes what follows for another protocol: it loses the body
    of every request of a JDK's HttpClient, which offers HTTP/2. It also buffers headers without
    limit before any key is checked; h11 stops at 16 kB.
    """
    watch_requests()
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{ImpatientProtocol.__name__}"
    # The last is the outermost. PlainHeaders' refusals are plain text: further inside, ProxyAnswers
    # would report them as a gateway that died.
    inside = [Middleware(LastReady), Middleware(BegunBodies), Middleware(ProxyAnswers)]
    return [*inside, Middleware(ProxyTraces), Middleware(PlainHeaders)]


class ImpatientProtocol(H11Protocol):
    """An HTTP connection that is closed when the client does not go on in time.

    uvicorn itself closes idle connections only after an answer, and only if no byte has come since.
    """

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request's head."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Parse what came. A head may have become complete, or the next one may have begun."""
        if data.count(b"\r\n") > MAX_LINES:
            self.transport.abort()
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Go on after an answer: uvicorn awaits the next head, but a body may still be coming."""
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:
            self._watch()

    def pause_writing(self) -> None:
        """Start to watch a client that reads more slowly than it is answered, or not at all."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """Stop watching a client that has read what was waiting."""
        super().resume_writing()
        stop(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers of a connection that is gone."""
        super().connection_lost(exc)
        stop(self._head)
        stop(self._unread)

    def _expect_reading(self) -> None:
        num_bytes = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(UNREAD_S, self._check_reading, num_bytes)

    def _check_reading(self, num_bytes: int) -> None:
        """Close the connection if the client read nothing meanwhile; a slow one may go on."""
        if self.transport.get_write_buffer_size() < num_bytes:
            self._expect_reading()
        else:
            self.transport.abort()

    def _watch(self) -> None:
        """Run a timer while a head or the rest of a body is due, and none otherwise."""
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
    """Middleware that refuses large or ambiguous heads and drops headers meant for Serve itself."""

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
