"""How many requests are taken in at once, and that their bodies come in time.

Serve hands a gateway so many requests and lets all others wait, probes too: whoever could hold
these places by sending slowly would hold them against everybody.

Places for bodies that are being read: so many in all, and so many of one caller.
"""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_ray.config.gateway import GatewayArgs, Uploads
from flux_ray.errors import BodyTooSlow, GatewayFull, RateLimited
from flux_ray.gateway.callers import Callers, key_of
from flux_ray.gateway.errors import answer_for, path_of
from flux_ray.gateway.probes import PROBES

BODY_RETRY_AFTER_S = 1


class CallersBodies:
    """The bodies of one caller: those that are being read, and those that wait for that."""

    def __init__(self, max_at_once: int) -> None:
        self.num_in = 0
        self.turns = asyncio.Semaphore(max_at_once)


class BodyPlaces:
    """Has `num_places`, of which one caller may take half: a burst of small bodies is soon read.

    Called from the event loop.
    """

    def __init__(self, num_places: int, wait_s: float) -> None:
        self.num_places = num_places
        self.wait_s = wait_s
        self._num_taken = 0
        self._callers: dict[str, CallersBodies] = {}

    @asynccontextmanager
    async def place(self, caller: str, max_at_once: int) -> AsyncIterator[None]:
        """Hold a place within: as soon as fewer than `max_at_once` of the caller's are being read.

        RateLimited where these are too many for too long, GatewayFull where there is no place.
        """
        bodies = self._enter(caller, max_at_once)
        try:
            try:
                async with asyncio.timeout(self.wait_s):
                    await bodies.turns.acquire()
            except TimeoutError:
                raise too_many(max_at_once) from None
            try:
                yield
            finally:
                bodies.turns.release()
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
    """Whose bodies they are need not be said: a key's, or an address's."""
    return RateLimited(
        f"{max_at_once} bodies of yours are being read, which is as many as may be at once:"
        " come back in a moment",
        None,
        BODY_RETRY_AFTER_S,
        max_at_once,
        0,
    )


FULL = "this gateway has as many requests in hand as it may: come back in a moment"
# Without a word about a body, these have none.
BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
# In a scope, where a proxy had all of the body before it passed the request on (begun_bodies.py).
BODY = "flux_ray.body"
# Who has one IPv6 address has as many as he likes of its network.
IPV6_PREFIX = 64


class Intake:
    """Middleware: refuses who finds no place, before its body is read; probes always find one."""

    def __init__(self, app: ASGIApp, *, args: GatewayArgs) -> None:
        self.app = app
        self.uploads = args.uploads
        self.max_requests = args.max_requests
        self.places = BodyPlaces(args.max_bodies, args.uploads.wait_s)
        self._callers = Callers(args)
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in PROBES:
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

    def timed(self, scope: Scope, receive: Receive, place: AsyncExitStack) -> Receive:
        """The same messages: the body in a place of its own, given back as soon as it is there."""
        if BODY in scope:
            return BodyAtHand(scope[BODY], receive).receive
        if not may_have_body(scope):
            return receive

        async def enter() -> None:
            """Wait for a place where the route begins to read: who does not read needs none."""
            uploader = self.uploader_of(Request(scope))
            await place.enter_async_context(self.places.place(*uploader))

        return ArrivingBody(receive, self.uploads, enter, place.aclose).receive

    def uploader_of(self, request: Request) -> "Uploader":
        """Whose share the body is of: its key's, or its address's where none is asked for."""
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
    """A body that came with its request, and comes once more as messages."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        """Return all of it; after that, as after any body, wait for the client to leave."""
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        while (message := await self._receive())["type"] == "http.request":
            pass
        return message


class ArrivingBody:
    """A body that is timed as it comes, packed or not. `enter` and `leave` its place.

    Errors are raised to whoever reads it, and answered as every error is.
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
        """Return the next message; after the body one only waits for the client to leave."""
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
    """Whether there may be bytes to wait for."""
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return True
    told = headers.get("content-length")
    return scope["method"] not in BODILESS if told is None else told.strip("0 ") != ""


def address_of(scope: Scope) -> str:
    """Return the address of who is at the other end of the connection, as Serve's proxy saw it."""
    host: str = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((address.packed, IPV6_PREFIX), strict=False))
    return host
