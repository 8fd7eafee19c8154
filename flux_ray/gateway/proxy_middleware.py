"""Middleware of Serve's proxies: traces, errors of their own, bodies that do not come, `/readyz`.

- `ProxyTraces` begins the trace of a request.
- `ProxyAnswers` words the proxy's own errors in the route's dialect, most often because a gateway
  died. Serve answers plain text, which tells no client whether to retry.
- `BegunBodies` passes a request on only once its body has begun to come. A request costs a proxy
  and a gateway milliseconds of processor, an idle connection next to nothing: hundreds that were
  opened at once, only to be refused a moment later, delayed others by seconds.
- `LastReady` answers `/readyz` with a gateway's last answer while there is no gateway. Serve's
  proxies hold requests for the seconds in which the only gateways are replaced (their node is
  drained, or they died). A load balancer without an answer would take every node out, and answer
  clients with errors of its own.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.errors import DeadlinePassed, FluxError, GatewayFailed, RateLimited
from flux_ray.gateway.errors import ErrorEvent, answer_in, dialect_at, failure_of
from flux_ray.gateway.http import HEADER, MEDIA_TYPE, event_text, request_id_for
from flux_ray.gateway.intake import BODY, address_of, may_have_body
from flux_ray.gateway.probes import READY, SERVES_OWN, is_probe
from flux_ray.tracing import TRACEPARENT, UNSAMPLED, request_span

# Serve's status if no application has the path: the gateway is not deployed.
NOT_FOUND = 404
TIMED_OUT = 408
# Characters of a path in a trace.
MAX_PATH = 200


class ProxyTraces:
    """Middleware that begins the trace of a request, or takes it up from the client's header.

    Probes are in no trace.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        if is_probe(scope["path"]):
            headers[TRACEPARENT] = UNSAMPLED
            await self.app(scope, receive, send)
            return
        # Not the query: the signature of a result is in it.
        about = {"http.request.method": scope["method"], "url.path": scope["path"][:MAX_PATH]}
        with request_span(headers, about) as (span, passed_on):

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            headers.update(passed_on)
            await self.app(scope, receive, send_and_note)


class ProxyAnswers:
    """Middleware around all of Serve's; it replaces Serve's plain text errors."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(SERVES_OWN):
            await self.app(scope, receive, send)
            return
        # Serve would make an id that looks like a client's, and log one of any length.
        headers = MutableHeaders(scope=scope)
        headers[HEADER] = request_id_for(headers)
        answer = ProxiedAnswer(scope, receive, send)
        try:
            await self.app(scope, receive, answer.send)
        finally:
            await answer.end()


class ProxiedAnswer:
    """One answer on its way: a gateway's passes as it is, the proxy's own is replaced."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._status: int | None = None
        self._is_plain = self._is_events = self._is_whole = False

    async def send(self, message: Message) -> None:
        """Pass a message on, or drop it if the answer is Serve's own."""
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
        """Send an error if the answer was Serve's own or missing, or if its events broke off."""
        if self._status is None or self._is_plain:
            error = failure_for(self._status)
            await answer_error(error, self._scope, self._receive, self._send)
        elif self._is_events and not self._is_whole:
            error = failure_for(None)
            told = ErrorEvent(error=failure_of(error), retry_after_s=error.retry_after_s)
            # The gateway may have died in the middle of an event; two line ends finish that.
            body = f"\n\n{event_text('error', told)}".encode()
            await self._send({"type": "http.response.body", "body": body})


async def answer_error(error: FluxError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request in place of a gateway; its head already has an id."""
    answer = answer_in(dialect_at(scope["method"], scope["path"]), error)
    answer.headers[HEADER] = Headers(scope=scope)[HEADER]
    await answer(scope, receive, send)


def is_of_serve(status: int, kind: str) -> bool:
    """Return whether an answer is Serve's own: gateways never send errors as plain text."""
    return status >= 400 and status != NOT_FOUND and kind.startswith("text/plain")


def failure_for(status: int | None) -> FluxError:
    """Return the error that the proxy's status stands for; None means that it sent no answer."""
    if status == TIMED_OUT:
        return DeadlinePassed("the request was not done in the time that it was given")
    return GatewayFailed(
        "the gateway that had the request ended before it answered: send it again, with the same"
        " idempotency-key"
    )


# Most bodies without an image are shorter. uvicorn buffers more than this for each anyway.
BEGINNING_BYTES = 16 * 2**10
# Seconds for a body to begin. Whoever is slower than a modem waits for a turn; the gateway then
# decides by its own limits whether that is too slow.
MOMENT_S = 1.0
# Seconds between two turns of one address.
TURN_EVERY_S = 1 / 16
MAX_WAIT_S = 30.0
TOO_MANY = "the bodies of too many of your requests do not come: send those first"


class BegunBodies:
    """Middleware that passes a request on as soon as its body has begun to come.

    Requests whose bodies have hardly begun after MOMENT_S are passed on one after the other, per
    address.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._turns: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not may_have_body(scope):
            await self.app(scope, receive, send)
            return
        body = ComingBody(receive)
        try:
            if not await body.begins(MOMENT_S):
                await self._wait_for_turn(address_of(scope), body)
        except RateLimited as error:
            await answer_error(error, scope, receive, send)
            return
        if not body.is_given_up:
            await self.app(body.with_scope(scope), body.receive, send)

    async def _wait_for_turn(self, address: str, body: "ComingBody") -> None:
        """Wait for the address's next turn, or until the body has begun.

        Raise RateLimited if too many bodies of that address wait already.
        """
        now_s = asyncio.get_running_loop().time()
        turn_s = max(now_s, self._turns.get(address, now_s)) + TURN_EVERY_S
        if turn_s > now_s + MAX_WAIT_S:
            raise RateLimited(TOO_MANY, limit=MAX_WAIT_S / TURN_EVERY_S)
        self._turns[address] = turn_s
        try:
            await body.begins(turn_s - now_s)
        finally:
            if self._turns.get(address) == turn_s:
                del self._turns[address]


class ComingBody:
    """A body whose first messages are kept until somebody receives them."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Message] = deque()
        self._num_bytes = 0
        self._is_over = False
        self.is_given_up = False

    async def begins(self, within_s: float) -> bool:
        """Return whether enough came in that time: BEGINNING_BYTES, all of it, or its end."""
        try:
            async with asyncio.timeout(within_s):
                while not self._is_over and self._num_bytes < BEGINNING_BYTES:
                    self._keep(await self._receive())
        except TimeoutError:
            return False
        return True

    def _keep(self, message: Message) -> None:
        self._kept.append(message)
        self.is_given_up = message["type"] == "http.disconnect"
        self._num_bytes += len(message.get("body", b""))
        self._is_over = not message.get("more_body", False)

    def with_scope(self, scope: Scope) -> Scope:
        """Return the scope with a copy of the body in it, if all of it is here.

        Serve sends the scope to the gateway, which otherwise has to ask the proxy for each message
        and wait. The messages stay, as applications other than ours read those.
        """
        if not self._is_over:
            return scope
        return {**scope, BODY: b"".join(message.get("body", b"") for message in self._kept)}

    async def receive(self) -> Message:
        """Return the next message, as if nobody had read it before."""
        return self._kept.popleft() if self._kept else await self._receive()


# A gateway answers `/readyz` from memory: if it takes longer than this it is busy or gone.
ANSWER_S = 0.5
# Seconds for which a last answer is repeated: longer than a gateway takes to start. After that the
# load balancer learns that there is none.
MAX_AGE_S = 60.0


# A probe's method and path; they are kept apart because answers to HEAD have no body.
Question = tuple[str, str]


class Word(NamedTuple):
    """A gateway's answer to a probe, and when it was given."""

    messages: list[Message]
    said_s: float


class LastReady:
    """Middleware next to Serve's that repeats a gateway's last good answer to `/readyz`.

    An answer that it is not ready counts at once.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self._clock = clock
        self._words: dict[Question, Word] = {}
        self._asking: dict[Question, asyncio.Task[list[Message]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(READY):
            await self.app(scope, receive, send)
            return
        question = scope["method"], scope["path"]
        word = self._words.get(question)
        if word is None or self._clock() - word.said_s > MAX_AGE_S:
            messages = await self._ask(scope, receive)
        else:
            messages = await self._ask_briefly(question, scope) or word.messages
        for message in messages:
            await send(message)

    async def _ask_briefly(self, question: Question, scope: Scope) -> list[Message]:
        """Return a gateway's answer, or nothing if none comes within ANSWER_S.

        The question goes on after that, and later probes share it: only one at a time waits in
        Serve for a gateway that is still to start.
        """
        asking = self._asking.get(question)
        if asking is None:
            asking = asyncio.create_task(self._ask(scope, nothing_more))
            self._asking[question] = asking
            asking.add_done_callback(lambda _: self._asking.pop(question))
        await asyncio.wait({asking}, timeout=ANSWER_S)
        if not asking.done() or asking.exception() is not None:
            return []
        return asking.result() if is_word(asking.result()) else []

    async def _ask(self, scope: Scope, receive: Receive) -> list[Message]:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, keep)
        if is_word(messages):
            self._note((scope["method"], scope["path"]), messages)
        return messages

    def _note(self, question: Question, messages: list[Message]) -> None:
        start, *body = messages
        if start["status"] == 200:
            # Whoever gets this answer later has another request id.
            headers = [each for each in start["headers"] if each[0] != HEADER.encode()]
            self._words[question] = Word([{**start, "headers": headers}, *body], self._clock())
        else:
            self._words.pop(question, None)


async def nothing_more() -> Message:
    """Never return: the proxy asks this question itself, so there is no client to wait for."""
    await asyncio.Event().wait()
    raise AssertionError


def is_word(messages: list[Message]) -> bool:
    """Return whether an answer is a gateway's, and not Serve's in its place."""
    if not messages:
        return False
    kind = Headers(raw=messages[0]["headers"]).get("content-type", "")
    return not is_of_serve(messages[0]["status"], kind)
