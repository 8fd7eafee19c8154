"""Every HTTP request has an id: the client's own, else a new one; answers bear it.

Serve's proxy makes one where the client sends none, and nobody can tell then whose it is: so our
part of the proxy (proxy_answers.py) makes it before, in a form of its own.
"""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_USABLE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# As long as a UUID, and none.
_OURS = re.compile(r"flux[0-9a-f]{28}")


class RequestId:
    """Middleware: the id is in `request.state.request_id` and in the answer's header."""

    def __init__(self, app: ASGIApp, *, proxy_sends_id: bool) -> None:
        self.app = app
        self.proxy_sends_id = proxy_sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_for(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start" and not self.proxy_sends_id:
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


def request_id_for(headers: Headers) -> str:
    """The client's id if it is short and plain, for it goes into logs."""
    sent = headers.get(HEADER, "")
    return sent if _USABLE.fullmatch(sent) else new_request_id()


def new_request_id() -> str:
    """For a client that sends none."""
    return f"flux{uuid.uuid4().hex[4:]}"


def is_ours(request_id: str) -> bool:
    """Whether its client sent none."""
    return _OURS.fullmatch(request_id) is not None
