"""Waits for what comes true by itself."""

import asyncio
from collections.abc import Awaitable, Callable


async def wait_until(check: Callable[[], Awaitable[bool]], timeout_s: float = 300.0) -> None:
    """Looks again and again; TimeoutError if it does not come true."""
    async with asyncio.timeout(timeout_s):
        while True:
            if await check():
                return
            await asyncio.sleep(0.01)
