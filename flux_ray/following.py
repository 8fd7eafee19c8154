"""News of a request and then its result, as one stream of values."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from flux_ray.request import Hear, ImageResult, News

Draw = Callable[[Hear], Awaitable[ImageResult]]


async def follow(draw: Draw) -> AsyncGenerator[News | ImageResult, None]:
    """What `draw` lets hear, and what it returns; its errors. Close it to leave."""
    heard: asyncio.Queue[News | None] = asyncio.Queue()
    drawing = asyncio.ensure_future(draw(heard.put_nowait))
    drawing.add_done_callback(lambda _: heard.put_nowait(None))
    try:
        while (news := await heard.get()) is not None:
            yield news
        yield await drawing
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
