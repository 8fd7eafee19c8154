"""Deadlines that a gateway keeps by a timer of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flux_ray.errors import FluxError


@asynccontextmanager
async def within(seconds: float | None, late: FluxError) -> AsyncIterator[None]:
    """Raise `late` if what is inside is not done by then. A TimeoutError from inside stays one."""
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            yield
    except TimeoutError:
        if not deadline.expired():
            raise
        raise late from None
