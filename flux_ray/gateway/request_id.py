"""Every HTTP request has an id: the client's own, else a new one; answers bear it."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_USABLE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


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
    return sent if _USABLE.fullmatch(sent) else uuid.uuid4().hex
