"""What Serve's proxies answer to `/readyz` while no gateway does: what the last one said.

Where the only gateways are replaced at once (their node is drained, or they died), Serve's proxies
keep requests for the seconds until there is another. A load balancer that heard nothing would send
none to any node, and answer them with errors of its own.
"""

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.gateway.probes import READY
from flux_ray.gateway.proxy_answers import is_of_serve
from flux_ray.gateway.request_id import HEADER

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
