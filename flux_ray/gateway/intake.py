"""Limit how many requests are taken in, and make their bodies come in time.

Serve hands a gateway a limited number of requests and lets all others wait, probes included.
Without these limits, whoever sends slowly could hold all of these places. `Intake` is the
middleware; `BodyPlaces` counts the bodies that are being read, in all and per caller;
`ArrivingBody` times one of them.
"""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.config import GatewayArgs, Uploads
from flux_ray.errors import BodyTooSlow, GatewayFull, RateLimited
from flux_ray.gateway.callers import Callers, key_of
from flux_ray.gateway.errors import answer_for, path_of
from flux_ray.gateway.playground.pages import is_page
from flux_ray.gateway.probes import PROBES

BODY_RETRY_AFTER_S = 1


class CallersBodies:
    """One caller's bodies: those that are being read, and those that wait for it."""

    def __init__(self, max_at_once: int) -> None:
        self.num_in = 0
        self.slots = asyncio.Semaphore(max_at_once)


class BodyPlaces:
    """The places for bodies that are being read, of which one caller may hold or await half.

    Half is enough: a burst of small bodies is read quickly. Called from the event loop only.
    """

    def __init__(self, num_places: int, wait_s: float) -> None:
        self.num_places = num_places
        self.wait_s = wait_s
        self._num_taken = 0
        self._callers: dict[str, CallersBodies] = {}

    @asynccontextmanager
    async def place(self, caller: str, max_at_once: int) -> AsyncIterator[None]:
        """Hold a place; wait while `max_at_once` bodies of the caller are being read.

        Raise RateLimited if that takes longer than `wait_s` or too many of the caller's wait, and
        GatewayFull if all places are taken.
        """
        bodies = self._enter(caller, max_at_once)
        try:
            try:
                async with asyncio.timeout(self.wait_s):
                    await bodies.slots.acquire()
            except TimeoutError:
                raise too_many(max_at_once) from None
            try:
                yield
            finally:
                bodies.slots.release()
        finally:
            self._leave(caller, bodies)

    def _enter(self, caller: str, max_at_once: int) -> CallersBodies:
        if self._num_taken >= self.num_places:
            raise GatewayFull("this gateway reads as many bodies as it may: come back in a moment")
        bodies = self._callers.get(caller) or CallersBodies(max_at_once)
        if bodies.num_in >= max(max_at_once, self.num_places // 2):
            raise too_many(max_at_once)
        self._callers[caller] = bodies
        bodies.num_in += 1
        self._num_taken += 1
        return bodies

    def _leave(self, caller: str, bodies: CallersBodies) -> None:
        self._num_taken -= 1
        bodies.num_in -= 1
        if not bodies.num_in:
            del self._callers[caller]


def too_many(max_at_once: int) -> RateLimited:
    """Return the error for too many bodies of one key or address; its text fits both."""
    return RateLimited(
        f"{max_at_once} bodies of yours are being read, which is as many as may be at once:"
        " come back in a moment",
        None,
        BODY_RETRY_AFTER_S,
        max_at_once,
        0,
    )


FULL = "this gateway has as many requests in hand as it may: come back in a moment"
# Requests of these methods have no body unless a header says so.
BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
# The key in a scope under which a proxy puts a body that it has read completely (`BegunBodies` in
# proxy_middleware.py).
BODY = "flux_ray.body"
# Whoever has one IPv6 address usually has its whole /64 network, and could use a new address for
# each body.
IPV6_PREFIX = 64


class Intake:
    """Middleware that refuses a request without a free place before its body is read.

    Probes always pass: a busy gateway is still alive. So do the pages of the playground, which are
    answered from memory: whoever opens them is told there that the gateway is busy.
    """

    def __init__(self, app: ASGIApp, *, args: GatewayArgs) -> None:
        self.app = app
        self.uploads = args.uploads
        self.has_pages = args.playground
        self.max_requests = args.max_requests
        self.places = BodyPlaces(args.max_bodies, args.uploads.wait_s)
        self._callers = Callers(args)
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._always_passes(path_of(scope)):
            await self.app(scope, receive, send)
            return
        if self._num_requests >= self.max_requests:
            # Not raised: errors from here are past the handlers.
            await answer_for(Request(scope), GatewayFull(FULL))(scope, receive, send)
            return
        self._num_requests += 1
        try:
            async with AsyncExitStack() as place:
                await self.app(scope, self.timed(scope, receive, place), send)
        finally:
            self._num_requests -= 1

    def _always_passes(self, path: str) -> bool:
        return path in PROBES or (self.has_pages and is_page(path))

    def timed(self, scope: Scope, receive: Receive, place: AsyncExitStack) -> Receive:
        """Return a `receive` that passes messages on and holds a place while the body arrives."""
        if BODY in scope:
            return BodyAtHand(scope[BODY], receive).receive
        if not may_have_body(scope):
            return receive

        async def enter() -> None:
            """Take a place when the route begins to read; a route that reads nothing needs none."""
            uploader = self.uploader_of(Request(scope))
            await place.enter_async_context(self.places.place(*uploader))

        return ArrivingBody(receive, self.uploads, enter, place.aclose).receive

    def uploader_of(self, request: Request) -> "Uploader":
        """Return whose share the body counts for: its key's, or its address's if it has no key."""
        most, key = self.uploads.max_per_caller, key_of(request)
        if key is None:
            return Uploader(address_of(request.scope), most)
        max_concurrent = self._callers.class_of(request).max_concurrent
        return Uploader(f"key {key.name}", min(most, max_concurrent or most))


class Uploader(NamedTuple):
    """Who sends a body, and how many of its bodies may be read at once."""

    name: str
    max_at_once: int


class BodyAtHand:
    """A body that a proxy read completely before it passed the request on."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        """Return the whole body; after that, as after any body, wait for the client to leave."""
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        while (message := await self._receive())["type"] == "http.request":
            pass
        return message


class ArrivingBody:
    """A body that is timed as it comes, packed or not.

    `enter` takes its place before the first byte is read, `leave` gives it back after the last.
    Errors are raised to the route that reads it, so that its handlers answer.
    """

    def __init__(
        self,
        receive: Receive,
        uploads: Uploads,
        enter: Callable[[], Awaitable[None]],
        leave: Callable[[], Awaitable[None]],
    ) -> None:
        self._receive = receive
        self._uploads = uploads
        self._enter = enter
        self._leave = leave
        self._num_bytes = 0
        self._began_s: float | None = None
        self._is_over = False

    async def receive(self) -> Message:
        """Return the next message; after the body, wait for the client to leave.

        Raise BodyTooSlow if the message does not come in time.
        """
        if self._is_over:
            return await self._receive()
        if self._began_s is None:
            await self._enter()
            self._began_s = asyncio.get_running_loop().time()
        due_s = self._uploads.due_s(self._num_bytes)
        try:
            async with asyncio.timeout_at(self._began_s + due_s):
                message = await self._receive()
        except TimeoutError:
            raise self._too_slow(due_s) from None
        self._num_bytes += len(message.get("body", b""))
        if not message.get("more_body", False):
            self._is_over = True
            await self._leave()
        return message

    def _too_slow(self, due_s: float) -> BodyTooSlow:
        if due_s >= self._uploads.max_s:
            return BodyTooSlow(f"the body took longer than {due_s:g} s")
        if not self._num_bytes:
            return BodyTooSlow(f"nothing of the body came within {due_s:g} s")
        rate = self._uploads.least_bytes_per_s
        return BodyTooSlow(
            f"the body came too slowly: {self._num_bytes} bytes in {due_s:.0f} s, where"
            f" {rate:g} a second are the least"
        )


def may_have_body(scope: Scope) -> bool:
    """Return whether the request may have a body to wait for."""
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return True
    told = headers.get("content-length")
    return scope["method"] not in BODILESS if told is None else told.strip("0 ") != ""


def address_of(scope: Scope) -> str:
    """Return the client's address as Serve's proxy saw it, for IPv6 its /64 network."""
    host: str = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((address.packed, IPV6_PREFIX), strict=False))
    return host
