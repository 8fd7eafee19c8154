"""HTTP to places that strangers name: the address that was checked is the one connected to."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from flux_ray import __version__
from flux_ray.config.gateway import Fetching
from flux_ray.errors import BadReference
from flux_ray.gateway.images.addresses import (
    Address,
    AddressRefused,
    is_reachable,
    literal,
    place_of,
)

# It logs every URL, and with it what callers sign theirs with.
logging.getLogger("httpx").setLevel(logging.WARNING)

Resolve = Callable[[str, int], Awaitable[list[str]]]

# A name server that never answers keeps a thread: not one of those that decode pictures.
RESOLVERS = ThreadPoolExecutor(8, thread_name_prefix="resolve")
HEADERS = {
    "accept": "image/*",
    # What is packed could be far longer than the bytes that are counted.
    "accept-encoding": "identity",
    "user-agent": f"flux-ray/{__version__}",
}


class Fetcher:
    """Reads what is behind a URL, as far as `fetching` allows."""

    def __init__(self, fetching: Fetching, resolve: Resolve | None = None) -> None:
        self.fetching = fetching
        self.guard = Guard(fetching, resolve or resolver(RESOLVERS))

    async def read(self, url: str, max_bytes: int, name: str, until_s: float) -> bytes:
        """The bytes behind the URL, not after `until_s` of the loop's clock.

        BadReference calls the picture by `name`, and says nothing of what answered.
        """
        if not self.fetching.enabled:
            raise BadReference(f"{name}: this gateway does not fetch URLs", "url")
        try:
            # Before httpx writes it anew.
            place_of(url, self.fetching)
            async with asyncio.timeout_at(until_s), self.guard.client(HEADERS) as client:
                return await read_stream(client, url, max_bytes, name)
        except AddressRefused:
            # The same for names that nobody has, or the answer would list the names in our network.
            message = f"{name}: its URL is not that of a public http or https server"
        except (TimeoutError, httpx.TimeoutException):
            message = f"{name}: its URL took longer than {self.fetching.timeout_s:g} s"
        except (httpx.RequestError, httpx.InvalidURL):
            message = f"{name}: its URL could not be read"
        raise BadReference(message, "url") from None


async def read_stream(client: httpx.AsyncClient, url: str, max_bytes: int, name: str) -> bytes:
    """The body of a plain 200, never more of it than may be."""
    too_large = BadReference(f"{name} is larger than {max_bytes} bytes", "url")
    async with client.stream("GET", url) as answer:
        packing = answer.headers.get("content-encoding", "identity")
        if answer.status_code != 200 or packing != "identity":
            raise BadReference(f"{name}: its URL did not answer with a picture", "url")
        told = answer.headers.get("content-length", "")
        if told.isdecimal() and (len(told) > 18 or int(told) > max_bytes):
            raise too_large
        data = bytearray()
        async for chunk in answer.aiter_raw():
            data += chunk
            if len(data) > max_bytes:
                raise too_large
    return bytes(data)


class Guard:
    """Makes clients for places that strangers name: references, and webhooks."""

    def __init__(self, fetching: Fetching, resolve: Resolve) -> None:
        self.fetching = fetching
        self.resolve = resolve
        # Reading the certificates takes longer than a request.
        self.trusted = httpx.create_ssl_context(trust_env=False)

    def client(self, headers: dict[str, str]) -> httpx.AsyncClient:
        """For one request: cookies of one caller's server are not for another's.

        Redirects are not followed. Raises Refused where it may not connect; the total time is the
        caller's to limit.
        """
        transport = PinnedTransport(self)
        return httpx.AsyncClient(
            transport=transport,
            headers=headers,
            timeout=self.fetching.timeout_s,
            follow_redirects=False,
            trust_env=False,
        )

    async def addresses(self, url: str) -> list[str]:
        """Where the URL may be asked for; Refused if any of its addresses is not to be reached."""
        host, port = place_of(url, self.fetching)
        address = literal(host)
        found: list[Address]
        if address is not None:
            found = [address]
        else:
            try:
                found = [ipaddress.ip_address(each) for each in await self.resolve(host, port)]
            except (OSError, ValueError):
                raise AddressRefused from None
        if not found or not all(is_reachable(each, self.fetching) for each in found):
            raise AddressRefused
        return [str(each) for each in found]


class PinnedTransport(httpx.AsyncHTTPTransport):
    """Resolves a request's host once, and connects to what was checked."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(verify=guard.trusted, trust_env=False)
        self.guard = guard

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The first of its addresses that takes the connection answers."""
        addresses = await self.guard.addresses(str(request.url))
        for address in addresses[:-1]:
            try:
                return await super().handle_async_request(pin(request, address))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await super().handle_async_request(pin(request, addresses[-1]))


def pin(request: httpx.Request, address: str) -> httpx.Request:
    """The same request to that address; `Host`, and the name in the certificate, stay."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions=request.extensions | {"sni_hostname": request.url.host},
    )


def resolver(executor: ThreadPoolExecutor) -> Resolve:
    """Asks the system, on threads of its own."""

    async def ask_resolver(host: str, port: int) -> list[str]:
        """The host's addresses, in the system's order of preference."""

        def ask() -> list[str]:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return [str(address[0]) for *_, address in found]

        return await asyncio.get_running_loop().run_in_executor(executor, ask)

    return ask_resolver
