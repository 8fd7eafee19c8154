"""Which URLs and addresses the gateway may connect to on a stranger's word."""

import ipaddress
import re
from typing import NamedTuple

import httpx

from flux_ray.config.gateway import Fetching

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
