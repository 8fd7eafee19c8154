"""A client that reads an answer while it is being made, which httpx's ASGI transport does not."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI


class Streamed:
    """One answer: its head, and its events and comments as they come."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._read = ""
        self.is_over = False

    async def send(self, message: dict[str, Any]) -> None:
        self._sent.put_nowait(message)

    async def head(self) -> "Streamed":
        """Wait for the headers."""
        start = await self._sent.get()
        self.status = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return self

    async def block(self) -> str | None:
        """Wait for the next event or comment; None after the last."""
        while "\n\n" not in self._read and not self.is_over:
            message = await self._sent.get()
            self._read += message["body"].decode()
            self.is_over = not message.get("more_body", False)
        block, _, self._read = self._read.partition("\n\n")
        return block or None

    async def blocks(self) -> list[str]:
        """Wait for all that is left."""
        blocks = []
        while (block := await self.block()) is not None:
            blocks.append(block)
        return blocks


@asynccontextmanager
async def streamed(
    api: FastAPI, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> AsyncIterator[Streamed]:
    """The answer to a POST; the client leaves at the end of the block."""
    answer, left = Streamed(), asyncio.Event()
    upload = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if upload:
            return upload.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    sent = {"content-type": "application/json", "host": "gateway"} | (headers or {})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "client": ("127.0.0.1", 1),
        "server": ("gateway", 80),
    }
    serving = asyncio.create_task(api(scope, receive, answer.send))
    try:
        yield answer
    finally:
        left.set()
        await asyncio.wait({serving})
        # Looked at, or asyncio complains of an error that nobody saw.
        serving.exception()


def event_of(block: str | None) -> tuple[str, dict[str, Any]]:
    """Its name and its data."""
    assert block is not None
    name, data = block.split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))
