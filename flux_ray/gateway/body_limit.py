"""No more of a request's body is read than the gateway allows."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.errors import BodyTooLarge


class BodyLimit:
    """Middleware: reading too large a body raises, before it is read where its length is told."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "")
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            self.check(int(told) if told.isdecimal() else 0)
            message = await receive()
            num_bytes += len(message.get("body", b""))
            self.check(num_bytes)
            return message

        await self.app(scope, receive_limited, send)

    def check(self, num_bytes: int) -> None:
        """Raised from the route's own reading, so that it is answered as every error is."""
        if num_bytes > self.max_body_bytes:
            raise BodyTooLarge(f"the body is larger than {self.max_body_bytes} bytes")
