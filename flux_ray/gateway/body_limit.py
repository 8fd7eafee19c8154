"""No more of a request's body is read than the gateway allows, and not for longer."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.errors import BodyTooLarge, BodyTooSlow

# The largest body over 5 Mbit/s; a caller who sends a byte a second would hold a place for years.
MAX_BODY_S = 120.0
# Python refuses to read numbers of thousands of digits.
MAX_DIGITS = 18


class BodyLimit:
    """Middleware: reading too large a body raises, before it is read where its length is told."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_body_s: float) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_body_s = max_body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = told_bytes(Headers(scope=scope), self.max_body_bytes)
        num_bytes = 0
        until_s: float | None = asyncio.get_running_loop().time() + self.max_body_s

        async def receive_limited() -> Message:
            nonlocal num_bytes, until_s
            self.check(told)
            try:
                async with asyncio.timeout_at(until_s):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(f"the body took longer than {self.max_body_s:g} s") from None
            num_bytes += len(message.get("body", b""))
            self.check(num_bytes)
            if not message.get("more_body", False):
                # From here on one only waits for the client to leave.
                until_s = None
            return message

        await self.app(scope, receive_limited, send)

    def check(self, num_bytes: int) -> None:
        """Raised from the route's own reading, so that it is answered as every error is."""
        if num_bytes > self.max_body_bytes:
            raise BodyTooLarge(f"the body is larger than {self.max_body_bytes} bytes")


def told_bytes(headers: Headers, max_bytes: int) -> int:
    """The length that the client says; more than `max_bytes` where it is not worth reading."""
    told = headers.get("content-length", "")
    if not told.isdecimal():
        return 0
    return int(told) if len(told) <= MAX_DIGITS else max_bytes + 1
