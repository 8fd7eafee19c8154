"""What Serve's proxies keep from gateways: requests whose bodies do not come.

Each request costs a proxy and a gateway some milliseconds of processor, a connection next to none.
Hundreds that were opened at once, only to be refused a moment later, kept others for seconds.
"""

import asyncio
from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.errors import RateLimited
from flux_ray.gateway.intake import BODY, address_of, may_have_body
from flux_ray.gateway.proxy_answers import answer_error

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
