"""Tasks that belong to no request, and go on whatever happens in them.

Deadlines that a gateway keeps by a timer of its own.
"""

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from flux_ray.errors import FluxError

logger = logging.getLogger("ray.serve")

# Ray starts a lost ledger anew within a second or two.
AGAIN_S = 0.2


def keep_running(work: Callable[[], Awaitable[None]], what: str) -> "asyncio.Task[None]":
    """Start a task that calls `work` again, a moment later, whenever it returns or fails.

    In an empty context: Ray would cancel what it has in flight with the request that started it.
    A failure is a mistake of ours, and is logged; without the task all requests would wait in vain.
    """

    async def run() -> None:
        while True:
            try:
                await work()
            except Exception:
                logger.exception("%s failed, and begins again", what)
            await asyncio.sleep(AGAIN_S)

    return asyncio.get_running_loop().create_task(run(), context=contextvars.Context())


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
