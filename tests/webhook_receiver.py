"""A real web server on this machine that takes webhooks, well or badly by their paths."""

import asyncio
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from tests.listening import listening


class Post(NamedTuple):
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


class WebhookReceiver:
    """`posts` are those that came in whole, `taken` the ids of those that were answered well."""

    def __init__(self) -> None:
        self.port = 0
        self.posts: list[Post] = []
        self.taken: Counter[str] = Counter()
        self._tries: Counter[str] = Counter()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            pairs = (line.split(": ", 1) for line in lines)
            headers = {name.lower(): value for name, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            method, target, _ = first.split()
            assert method == "POST"
            self.posts.append(Post(target, headers, body))
            await self.write(target.partition("?")[0], headers.get("webhook-id", ""), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The client has seen enough.
        finally:
            writer.close()

    async def write(self, path: str, message_id: str, writer: asyncio.StreamWriter) -> None:
        self._tries[message_id] += 1
        if path == "/third" and self._tries[message_id] < 3:
            path = "/failing"
        if path == "/moody":
            await asyncio.sleep(random.uniform(0, 0.6))
            path = random.choice(["/good", "/good", "/failing", "/closes"])
        if path == "/closes":
            return
        statuses = {
            "/failing": "500 Oh",
            "/gone": "410 Gone",
            "/redirect": "307 Elsewhere\r\nlocation: /good",
            "/away": "302 Found\r\nlocation: http://169.254.169.254/latest",
            "/empty": "204 No Content",
            "/babble": "what?",
        }
        status = statuses.get(path, "200 OK")
        if path == "/hangs":
            await asyncio.sleep(60)
        writer.write(f"HTTP/1.1 {status}\r\nconnection: close\r\n".encode())
        while path == "/slow-head":
            writer.write(b"x-more: 1\r\n")
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.write(b"\r\n")
        while path in ("/endless", "/slow-body"):
            writer.write(b"x" * (65536 if path == "/endless" else 1))
            await writer.drain()
            await asyncio.sleep(0.001 if path == "/endless" else 0.02)
        await writer.drain()
        if status.startswith("2"):
            self.taken[message_id] += 1


@asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None) -> AsyncIterator[WebhookReceiver]:
    """The server, on a free port of 127.0.0.1."""
    receiver = WebhookReceiver()
    async with listening(receiver.answer, tls) as receiver.port:
        yield receiver
