"""Server-sent events that begin at once and are never silent for long.

Proxies and load balancers cut a connection on which nothing has come for a minute, and a tier that
starts from no replica takes longer than that.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

from pydantic import BaseModel

MEDIA_TYPE = "text/event-stream"
HEADERS = {
    # Nobody on the way is to keep the events, to pack them, or to collect them first.
    "cache-control": "no-store, no-transform",
    "x-accel-buffering": "no",
}
# What is refused sooner is answered with the status of its error.
HOLD_S = 0.3
HEARTBEAT_S = 5.0


def event_text(name: str, data: BaseModel) -> str:
    """Return an event as it goes over the wire.

    In ASCII: clients cut lines by their language's rules, which know more signs than the standard.
    """
    written = data.model_dump_json(exclude_none=True, ensure_ascii=True)
    return f"event: {name}\ndata: {written}\n\n"


def comment_text(words: str) -> str:
    """Return a comment, which every client skips."""
    return f": {words}\n\n"


async def kept_alive(
    texts: AsyncGenerator[str, None], words: Callable[[], str]
) -> AsyncGenerator[str, None]:
    """Yield `texts`, and a comment of `words()` whenever none has come for a heartbeat.

    The first comment comes after HOLD_S. Close it, and `texts` is closed.
    """
    patience_s = HOLD_S
    coming: asyncio.Future[str] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(texts))
            done, _ = await asyncio.wait((coming,), timeout=patience_s)
            patience_s = HEARTBEAT_S
            if not done:
                yield comment_text(words())
                continue
            came, coming = coming, None
            try:
                text = came.result()
            except StopAsyncIteration:
                return
            yield text
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await texts.aclose()
