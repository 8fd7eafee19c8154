"""What Serve's proxies answer themselves, in the words of the dialect: a gateway has died, mostly.

Serve has plain text for it, which tells no client whether to come again.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.errors import DeadlinePassed, FluxError, GatewayFailed
from flux_ray.gateway.dialects import dialect_at
from flux_ray.gateway.errors import ErrorEvent, answer_in, failure_of
from flux_ray.gateway.event_stream import MEDIA_TYPE, event_text
from flux_ray.gateway.request_id import HEADER, request_id_for

# Serve's routes: its own words are what is asked for there.
SERVES_OWN = "/-/"
# No path of an application: it is not deployed.
NOT_FOUND = 404
TIMED_OUT = 408


class ProxyAnswers:
    """Middleware of the proxies, around all of Serve's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(SERVES_OWN):
            await self.app(scope, receive, send)
            return
        # Serve would make an id that nobody could tell from a client's, or log one of any length.
        headers = MutableHeaders(scope=scope)
        headers[HEADER] = request_id_for(headers)
        answer = ProxiedAnswer(scope, receive, send)
        try:
            await self.app(scope, receive, answer.send)
        finally:
            await answer.end()


class ProxiedAnswer:
    """An answer on its way through: the gateway's as it is, and the proxy's own in our words."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._status: int | None = None
        self._is_plain = self._is_events = self._is_whole = False

    async def send(self, message: Message) -> None:
        """Pass a part of it on, or keep it back where it is Serve's own."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._is_plain = is_of_serve(message["status"], kind)
            self._is_events = kind.startswith(MEDIA_TYPE)
        elif message["type"] == "http.response.body":
            self._is_whole = not message.get("more_body", False)
        if not self._is_plain:
            await self._send(message)

    async def end(self) -> None:
        """Say what went wrong where the proxy said it in its words, or did not end the answer."""
        if self._status is None or self._is_plain:
            error = failure_for(self._status)
            await answer_error(error, self._scope, self._receive, self._send)
        elif self._is_events and not self._is_whole:
            error = failure_for(None)
            told = ErrorEvent(error=failure_of(error), retry_after_s=error.retry_after_s)
            # It may have been in the middle of an event.
            body = f"\n\n{event_text('error', told)}".encode()
            await self._send({"type": "http.response.body", "body": body})


async def answer_error(error: FluxError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, whose head has its id, in place of a gateway."""
    answer = answer_in(dialect_at(scope["method"], scope["path"]), error)
    answer.headers[HEADER] = Headers(scope=scope)[HEADER]
    await answer(scope, receive, send)


def is_of_serve(status: int, kind: str) -> bool:
    """Gateways have no errors in plain text."""
    return status >= 400 and status != NOT_FOUND and kind.startswith("text/plain")


def failure_for(status: int | None) -> FluxError:
    """What it means that the proxy answers so; None: that it does not."""
    if status == TIMED_OUT:
        return DeadlinePassed("the request was not done in the time that it was given")
    return GatewayFailed(
        "the gateway that had the request ended before it answered: send it again, with the same"
        " idempotency-key"
    )
