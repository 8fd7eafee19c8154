"""A real HTTP server on this machine with OpenAI's chat API, whose LLM says what it is told to."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.listening import listening


def completion(text: Any, reason: str = "stop") -> bytes:
    """The body of an answer that says `text`."""
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": reason}]
    return json.dumps({"object": "chat.completion", "choices": choices}).encode()


class ChatServer:
    """`asked` are the bodies that reached it, `headers` their headers; `came` and `left` are set
    when a client comes, and when one hangs up before it is answered.

    It answers `body` with `status` after `delay_s`; without a body it says "detailed: " and the
    prompt.
    """

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.status = 200
        self.body: bytes | None = None
        self.more_headers: tuple[str, ...] = ()
        self.delay_s = 0.0
        self.num_open = self.most_open = 0
        self.came, self.left = asyncio.Event(), asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The client has left.
        finally:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.paths.append(first.split()[1])
        self.headers.append(headers)
        self.asked.append(json.loads(body) if body else {})
        self.num_open += 1
        self.came.set()
        self.most_open = max(self.most_open, self.num_open)
        try:
            if self.delay_s:
                leaving = asyncio.ensure_future(reader.read())
                done, _ = await asyncio.wait({leaving}, timeout=self.delay_s)
                if done:
                    self.left.set()
                leaving.cancel()
        finally:
            self.num_open -= 1
        said = self.body
        if said is None:
            said = completion(f"detailed: {prompt_of(self.asked[-1])}" if body else None)
        head = [f"HTTP/1.1 {self.status} X", f"content-length: {len(said)}", "connection: close"]
        writer.write("\r\n".join([*head, *self.more_headers, "", ""]).encode() + said)
        await writer.drain()


def prompt_of(body: dict[str, Any]) -> str:
    """The words of the user's message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


@asynccontextmanager
async def chatting() -> AsyncIterator[ChatServer]:
    """The server, on a free port of 127.0.0.1."""
    server = ChatServer()
    async with listening(server.answer) as server.port:
        yield server
