"""No more of a request's body is read than the gateway allows."""

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.config.gateway import Limits
from flux_ray.errors import BodyTooLarge
from flux_ray.gateway.memory_budget import MEMORY, Share

# Python refuses to read numbers of thousands of digits.
MAX_DIGITS = 18
# JSON is in memory as it came, and as the texts that were read from it. Files of a form are on the
# disk, but for a megabyte each, and then in memory one by one.
JSON_COPIES, FORM_COPIES = 2, 1
# Of a request's state: what its body holds of the budget.
SHARE = "body_share"


class BodyLimit:
    """Middleware: reading too large a body raises, before it is read where its length is told.

    So does one for which the gateway has no room. What was read is in the budget until the answer
    is out, or until the route says that it is through with it.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        share = MEMORY.share(self.limits.max_kept_bytes)
        scope.setdefault("state", {})[SHARE] = share
        try:
            await self.app(scope, self.limited(Headers(scope=scope), share, receive), send)
        finally:
            share.release()

    def limited(self, headers: Headers, share: Share, receive: Receive) -> Receive:
        """The same messages, within the limits."""
        told, copies = told_bytes(headers, self.limits.max_body_bytes), copies_of(headers)
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            self.check(told)
            message = await receive()
            num_arrived = len(message.get("body", b""))
            if num_arrived and not num_bytes:
                MEMORY.check_room(max(told, num_arrived) * copies, self.limits.max_kept_bytes)
            num_bytes += num_arrived
            self.check(num_bytes)
            share.grow(num_arrived * copies)
            return message

        return receive_limited

    def check(self, num_bytes: int) -> None:
        """Raised from the route's own reading, so that it is answered as every error is."""
        if num_bytes > self.limits.max_body_bytes:
            raise BodyTooLarge(f"the body is larger than {self.limits.max_body_bytes} bytes")


def told_bytes(headers: Headers, max_bytes: int) -> int:
    """The length that the client says; more than `max_bytes` where it is not worth reading."""
    told = headers.get("content-length", "")
    if not told.isdecimal():
        return 0
    return int(told) if len(told) <= MAX_DIGITS else max_bytes + 1


def copies_of(headers: Headers) -> int:
    """How many times a body of that type is in memory."""
    is_form = headers.get("content-type", "").lower().startswith("multipart/")
    return FORM_COPIES if is_form else JSON_COPIES


def forget_body(request: Request) -> None:
    """Give back what the body holds of the budget: nothing of it is in memory any more."""
    share: Share = getattr(request.state, SHARE)
    share.release()


async def read_body(request: Request) -> bytes:
    """The whole body, which the request does not keep for as long as it is answered."""
    return b"".join([chunk async for chunk in request.stream()])
