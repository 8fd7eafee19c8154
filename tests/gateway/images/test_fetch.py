"""The client for places that strangers name: certificates, addresses in turn, cookies."""

import asyncio
import ipaddress
import ssl

import pytest
import trustme

from flux_ray.config.gateway import Fetching
from flux_ray.errors import BadReference
from flux_ray.gateway.images.fetch import Fetcher, is_reachable
from tests.gateway.images.image_server import serving


def fetcher_for(port: int, addresses: list[str]) -> Fetcher:
    """It believes that every name stands for those addresses."""

    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    networks = ("127.0.0.0/8",)
    return Fetcher(Fetching.model_validate({"ports": (port,), "networks": networks}), resolve)


async def read(fetcher: Fetcher, url: str) -> bytes:
    until_s = asyncio.get_running_loop().time() + 2
    return await fetcher.read(url, 100_000, "image 1", until_s)


@pytest.mark.parametrize("name", ["images.test", "other.test"])
async def test_the_certificate_is_the_hosts_not_the_addresses(name):
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("images.test", "127.0.0.1").configure_cert(tls)
    async with serving(b"image", tls) as server:
        fetcher = fetcher_for(server.port, ["127.0.0.1"])
        fetcher.guard.trusted = ssl.create_default_context()
        authority.configure_trust(fetcher.guard.trusted)
        url = f"https://{name}:{server.port}/image"
        if name == "images.test":
            assert await read(fetcher, url) == b"image"
        else:
            with pytest.raises(BadReference, match="could not be read"):
                await read(fetcher, url)
        assert len(server.asked) == (name == "images.test")


async def test_strange_certificates_are_not_trusted():
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("images.test").configure_cert(tls)
    async with serving(b"image", tls) as server:
        fetcher = fetcher_for(server.port, ["127.0.0.1"])
        with pytest.raises(BadReference, match="could not be read"):
            await read(fetcher, f"https://images.test:{server.port}/image")
        assert server.asked == []


async def test_the_next_address_where_one_takes_no_connection():
    async with serving(b"image") as server:
        fetcher = fetcher_for(server.port, ["127.0.0.2", "127.0.0.1"])
        assert await read(fetcher, f"http://images.test:{server.port}/image") == b"image"
        assert server.asked == ["/image"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::10.0.0.1", False),
        ("2002:a00:1::", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("224.0.0.1", False),
        ("100.64.0.1", False),
        ("::7f00:1", False),
    ],
)
def test_what_is_public(address, expected):
    assert is_reachable(ipaddress.ip_address(address), Fetching()) is expected


def test_an_operators_network():
    fetching = Fetching.model_validate({"networks": ("10.1.2.0/24",)})
    assert is_reachable(ipaddress.ip_address("::ffff:10.1.2.9"), fetching)
    assert not is_reachable(ipaddress.ip_address("10.1.3.1"), fetching)
