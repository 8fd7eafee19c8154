"""HTTP to places that strangers name: the address that was checked is the one connected to.

Which URLs and addresses the gateway may connect to on a stranger's word.
"""

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx

from flux_ray import __version__
from flux_ray.config.gateway import Fetching
from flux_ray.errors import BadReference

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL_CHARS = 4096
PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.(?!-)[a-z0-9_-]{1,63})*")
_USER = re.compile(r"[^/?#]*//[^/?#]*@")
# Names that end in a number are IPv4 addresses to some resolvers: 2130706433, 0x7f.1, 0177.0.0.1.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# IPv6 networks that lead to the IPv4 address in bits 96..128, or 16..48.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_6TO4 = ipaddress.IPv6Network("2002::/16")


class AddressRefused(Exception):
    """Not a place that the gateway connects to; says no more, for the caller may be probing."""


class Destination(NamedTuple):
    """Where a URL leads, before its name is resolved."""

    host: str
    port: int


def place_of(url: str, fetching: Fetching) -> Destination:
    """The place of a URL that is plain enough for every parser to read it alike."""
    # Parsers differ on these; the URL that is checked must be the one that is asked for.
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
    """A name, or an address in its usual form; if there is an allow-list, one that is on it."""
    if fetching.hosts is not None and host not in fetching.hosts:
        return False
    if literal(host) is not None:
        return True
    return bool(_HOST.fullmatch(host)) and not _NUMBER.fullmatch(host.rpartition(".")[2])


def literal(host: str) -> Address | None:
    """The address that the host is; None for a name."""
    # A zone would choose the network card.
    if "%" in host:
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_reachable(address: Address, fetching: Fetching) -> bool:
    """Public, or in a network that the operator named."""
    address = unwrap(address)
    if any(address in network for network in fetching.networks):
        return True
    # Python calls these three global.
    if address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.is_site_local:
        return False
    return address.is_global


def unwrap(address: Address) -> Address:
    """The IPv4 address that an IPv6 one leads to, for ::ffff:127.0.0.1 is 127.0.0.1."""
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(address.packed[12:])
    if address in _6TO4:
        return ipaddress.IPv4Address(address.packed[2:6])
    return address


# It logs every URL, and with it what callers sign theirs with.
logging.getLogger("httpx").setLevel(logging.WARNING)

Resolve = Callable[[str, int], Awaitable[list[str]]]

# A name server that never answers keeps a thread: not one of those that decode images.
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

        BadReference calls the image by `name`, and says nothing of what answered.
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
