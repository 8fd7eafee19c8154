"""Fetch from URLs that strangers name, without being led into the operator's own network (SSRF).

First come the checks of URLs and addresses, then `Fetcher`, which reads reference images. `Guard`
makes HTTP clients that resolve a host once and connect to exactly the address that was checked;
webhooks use it, too.
"""

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import httpx

from flux_ray import __version__
from flux_ray.config import Fetching
from flux_ray.errors import BadReference

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL_CHARS = 4096
PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.(?!-)[a-z0-9_-]{1,63})*")
_USER = re.compile(r"[^/?#]*//[^/?#]*@")
# Some resolvers take names that end in a number for IPv4 addresses: 2130706433, 0x7f.1, 0177.0.0.1.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# IPv6 networks whose addresses lead to the IPv4 address in bits 96 to 128, or 16 to 48.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_6TO4 = ipaddress.IPv6Network("2002::/16")


class AddressRefused(Exception):
    """The gateway does not connect there. It says no more, as the caller may be probing."""


class Destination(NamedTuple):
    """Where a URL leads, before its name is resolved."""

    host: str
    port: int


def place_of(url: str, fetching: Fetching) -> Destination:
    """Return host and port of a URL. Raise AddressRefused if it is odd or not allowed."""
    # URL parsers differ on these, and the URL that was checked must be the one that is requested.
    if len(url) > MAX_URL_CHARS or not url.isascii() or re.search(r"[\x00-\x20\x7f\\]", url):
        raise AddressRefused
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise AddressRefused from None
    if parsed.scheme not in fetching.schemes or _USER.match(url):
        raise AddressRefused
    host = parsed.raw_host.decode("ascii")
    port = PORTS[parsed.scheme] if parsed.port is None else parsed.port
    if port not in fetching.ports or not is_allowed_host(host, fetching):
        raise AddressRefused
    return Destination(host, port)


def is_allowed_host(host: str, fetching: Fetching) -> bool:
    """Return whether a host is a plain name or address, and on the allow-list if there is one."""
    if fetching.hosts is not None and host not in fetching.hosts:
        return False
    if literal(host) is not None:
        return True
    return bool(_HOST.fullmatch(host)) and not _NUMBER.fullmatch(host.rpartition(".")[2])


def literal(host: str) -> Address | None:
    """Return the address that the host is, or None for a name."""
    # A zone (`fe80::1%eth0`) would choose the network interface.
    if "%" in host:
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_reachable(address: Address, fetching: Fetching) -> bool:
    """Return whether the address is public, or in a network that the operator allows."""
    address = unwrap(address)
    if any(address in network for network in fetching.networks):
        return True
    # Python counts these three as global.
    if address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.is_site_local:
        return False
    return address.is_global


def unwrap(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 one leads to: ::ffff:127.0.0.1 is 127.0.0.1."""
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(address.packed[12:])
    if address in _6TO4:
        return ipaddress.IPv4Address(address.packed[2:6])
    return address


# httpx logs every URL, and callers' URLs hold their signatures.
logging.getLogger("httpx").setLevel(logging.WARNING)

Resolve = Callable[[str, int], Awaitable[list[str]]]

# Own threads: a name server that never answers blocks one, which would otherwise decode images.
RESOLVERS = ThreadPoolExecutor(8, thread_name_prefix="resolve")
HEADERS = {
    "accept": "image/*",
    # Packed content could be far longer than the bytes that are counted.
    "accept-encoding": "identity",
    "user-agent": f"flux-ray/{__version__}",
}


class Fetcher:
    """Reads what is behind a URL, as far as `fetching` allows."""

    def __init__(self, fetching: Fetching, resolve: Resolve | None = None) -> None:
        self.fetching = fetching
        self.guard = Guard(fetching, resolve or resolver(RESOLVERS))

    async def read(self, url: str, max_bytes: int, name: str, until_s: float) -> bytes:
        """Return the bytes behind the URL, at latest at `until_s` of the loop's clock.

        Raise BadReference, which calls the image `name` and tells nothing about the server that
        answered.
        """
        if not self.fetching.enabled:
            raise BadReference(f"{name}: this gateway does not fetch URLs", "url")
        try:
            # Checked as written, before httpx normalizes it.
            place_of(url, self.fetching)
            async with asyncio.timeout_at(until_s), self.guard.client(HEADERS) as client:
                return await read_stream(client, url, max_bytes, name)
        except AddressRefused:
            # The same text for names that do not exist, or answers would reveal the names of our
            # network.
            message = f"{name}: its URL is not that of a public http or https server"
        except (TimeoutError, httpx.TimeoutException):
            message = f"{name}: its URL took longer than {self.fetching.timeout_s:g} s"
        except (httpx.RequestError, httpx.InvalidURL):
            message = f"{name}: its URL could not be read"
        raise BadReference(message, "url") from None


async def read_stream(client: httpx.AsyncClient, url: str, max_bytes: int, name: str) -> bytes:
    """Return the body of a plain 200, reading at most `max_bytes` of it. Raise BadReference."""
    too_large = BadReference(f"{name} is larger than {max_bytes} bytes", "url")
    async with client.stream("GET", url) as answer:
        packing = answer.headers.get("content-encoding", "identity")
        if answer.status_code != 200 or packing != "identity":
            raise BadReference(f"{name}: its URL did not answer with an image", "url")
        told = answer.headers.get("content-length", "")
        if told.isdecimal() and (len(told) > 18 or int(told) > max_bytes):
            raise too_large
        data = bytearray()
        async for chunk in answer.aiter_raw():
            data += chunk
            if len(data) > max_bytes:
                raise too_large
    return bytes(data)


@cache
def certificates() -> ssl.SSLContext:
    """Return the context that trusts the well-known authorities, read once in this process.

    Reading them takes longer than a request.
    """
    return httpx.create_ssl_context(trust_env=False)


class Guard:
    """Makes HTTP clients for places that strangers name: references and webhooks."""

    def __init__(self, fetching: Fetching, resolve: Resolve) -> None:
        self.fetching = fetching
        self.resolve = resolve
        self.trusted = certificates()

    def client(self, headers: dict[str, str]) -> httpx.AsyncClient:
        """Return a client for one request: one caller's cookies must not reach another's server.

        It follows no redirects, as those were not checked, and raises AddressRefused where it may
        not connect. The caller has to limit the total time.
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
        """Return the URL's addresses. Raise AddressRefused unless all of them are reachable."""
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
    """A transport that resolves the host once and connects to an address that was checked.

    If httpx resolved it again, a name server could give another address than the one that was
    checked.
    """

    def __init__(self, guard: Guard) -> None:
        super().__init__(verify=guard.trusted, trust_env=False)
        self.guard = guard

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request to the first checked address that accepts the connection."""
        addresses = await self.guard.addresses(str(request.url))
        for address in addresses[:-1]:
            try:
                return await super().handle_async_request(pin(request, address))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await super().handle_async_request(pin(request, addresses[-1]))


def pin(request: httpx.Request, address: str) -> httpx.Request:
    """Return the request for that address; `Host` and the certificate's name stay the URL's."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions=request.extensions | {"sni_hostname": request.url.host},
    )


def resolver(executor: ThreadPoolExecutor) -> Resolve:
    """Return a function that asks the system's resolver on the given threads."""

    async def ask_resolver(host: str, port: int) -> list[str]:
        """Return the host's addresses, in the system's order of preference."""

        def ask() -> list[str]:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return [str(address[0]) for *_, address in found]

        return await asyncio.get_running_loop().run_in_executor(executor, ask)

    return ask_resolver
