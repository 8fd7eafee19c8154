"""What Serve's proxies answer themselves, in the words of the dialect: a gateway has died, mostly.

Serve has plain text for it, which tells no client whether to come again.

What Serve's proxies keep from gateways: requests whose bodies do not come.

Each request costs a proxy and a gateway some milliseconds of processor, a connection next to none.
Hundreds that were opened at once, only to be refused a moment later, kept others for seconds.

What Serve's proxies answer to `/readyz` while no gateway does: what the last one said.

Where the only gateways are replaced at once (their node is drained, or they died), Serve's proxies
keep requests for the seconds until there is another. A load balancer that heard nothing would send
none to any node, and answer them with errors of its own.
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
from flux_ray.gateway.probes import READY

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


# Most bodies without an image are shorter; uvicorn keeps more of each itself.
BEGINNING_BYTES = 16 * 2**10
# Who sends more slowly than a modem waits for a turn. The gateway judges them, as it is told to.
MOMENT_S = 1.0
# Of one address.
TURN_EVERY_S = 1 / 16
MAX_WAIT_S = 30.0
TOO_MANY = "the bodies of too many of your requests do not come: send those first"


class BegunBodies:
    """Middleware of the proxies: passes on a request as soon as its body has begun to come.

    Those of which nothing much came for a moment are passed on one after the other.
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
        """RateLimited where too many of that address wait. Over as soon as the body has begun."""
        now_s = asyncio.get_running_loop().time()
        turn_s = max(now_s, self._turns.get(address, now_s)) + TURN_EVERY_S
        if turn_s > now_s + MAX_WAIT_S:
            raise RateLimited(TOO_MANY)
        self._turns[address] = turn_s
        try:
            await body.begins(turn_s - now_s)
        finally:
            if self._turns.get(address) == turn_s:
                del self._turns[address]


class ComingBody:
    """A body of which the first messages are kept until somebody receives them."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Message] = deque()
        self._num_bytes = 0
        self._is_over = False
        self.is_given_up = False

    async def begins(self, within_s: float) -> bool:
        """Return whether it came within that time: a good piece of it, all of it, or its end."""
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
        """Return the scope with a copy of the body in it if all of it is here.

        Serve sends the scope to the gateway, which would have to ask back for messages and wait.
        Other applications do so.
        """
        if not self._is_over:
            return scope
        return {**scope, BODY: b"".join(message.get("body", b"") for message in self._kept)}

    async def receive(self) -> Message:
        """Return the next message, as if nobody had looked."""
        return self._kept.popleft() if self._kept else await self._receive()


# A gateway answers from its last word, so that it is busy or gone if it takes longer.
ANSWER_S = 0.5
# Longer than a gateway takes to start. Then nobody is told to come any more.
MAX_AGE_S = 60.0


# Its method and its path: answers to HEAD have no body.
Question = tuple[str, str]


class Word(NamedTuple):
    """An answer that a gateway gave, and when."""

    messages: list[Message]
    said_s: float


class LastReady:
    """Middleware of the proxies, next to Serve's. A word against it counts at once."""

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
        """Return what a gateway says; nothing if none does now.

        The question stays: only one at a time waits for a gateway that is to come.
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
            # Who hears it later has another id.
            headers = [each for each in start["headers"] if each[0] != HEADER.encode()]
            self._words[question] = Word([{**start, "headers": headers}, *body], self._clock())
        else:
            self._words.pop(question, None)


async def nothing_more() -> Message:
    """Never return: the client of this question is the proxy."""
    await asyncio.Event().wait()
    raise AssertionError


def is_word(messages: list[Message]) -> bool:
    """Say whether a gateway said it, and not Serve in its place."""
    if not messages:
        return False
    kind = Headers(raw=messages[0]["headers"]).get("content-type", "")
    return not is_of_serve(messages[0]["status"], kind)
