"""A real web server on this machine that behaves well on one path, and badly on the others."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.listening import listening


class ImageServer:
    """`asked` are the request lines that reached it, and `hosts` what they took it for."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.port = 0
        self.asked: list[str] = []
        self.hosts: list[str] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split()[1]
            self.asked.append(path)
            self.hosts += [line[6:] for line in head.split("\r\n") if line.lower()[:5] == "host:"]
            await self.write(path.partition("?")[0], writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The client has seen enough.
        finally:
            writer.close()

    async def write(self, path: str, writer: asyncio.StreamWriter) -> None:
        for start in ("301", "302", "307", "308"):
            if path == f"/{start}":
                writer.write(response(f"{start} Moved", b"", "location: /image"))
        bodies = {
            "/image": response("200 OK", self.image),
            "/away": response("302 Found", b"", "location: http://169.254.169.254/latest"),
            "/missing": response("404 Not Found", self.image),
            "/failing": response("500 Oh", b"secret of the other server"),
            "/html": response("200 OK", b"<html>root:x:0:0</html>", "content-type: image/png"),
            "/packed": response("200 OK", self.image, "content-encoding: gzip"),
            "/told": b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\n",
            "/told-digits": b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n",
            "/cut": response("200 OK", self.image)[:-20],
            "/babble": b"\0\1\2 not http at all\r\n\r\n",
            "/silent": b"",
        }
        writer.write(bodies.get(path, b""))
        if path in ("/endless", "/slow"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while path == "/endless":
            writer.write(b"\x89" * 65536)
            await writer.drain()
        while path == "/slow":
            writer.write(b"\x89")
            await writer.drain()
            await asyncio.sleep(0.02)
        if path == "/silent":
            await asyncio.sleep(5)
        await writer.drain()


def response(status: str, body: bytes, *headers: str) -> bytes:
    """A whole answer."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@asynccontextmanager
async def serving(image: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[ImageServer]:
    """The server, on a free port of 127.0.0.1."""
    server = ImageServer(image)
    async with listening(server.answer, tls) as server.port:
        yield server
