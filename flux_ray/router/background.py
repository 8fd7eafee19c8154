"""Run tasks that belong to no request, and time limits with an error of ours.

`keep_running` restarts a task whatever happens in it. `within` raises a given error when a block
takes too long.
"""

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from flux_ray.errors import FluxError

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

# The pause before work is started again. Most often the ledger was lost, and Ray starts a new one
# within a second or two.
AGAIN_S = 0.2


def keep_running(work: Callable[[], Awaitable[None]], what: str) -> "asyncio.Task[None]":
    """Start a task that calls `work` again, AGAIN_S later, whenever it returns or fails.

    The task has an empty context; otherwise Ray would cancel its calls together with the request
    that started it. A failure is a bug of ours and is logged; if the task ended with it, all
    requests would wait in vain. `what` names the task in the log.
    """

    async def run() -> None:
        while True:
            try:
                await work()
            except Exception:
                logger.exception("%s failed, and begins again", what)
            await asyncio.sleep(AGAIN_S)

    return asyncio.get_running_loop().create_task(run(), context=contextvars.Context())


class SharedCall(Generic[T]):
    """A blocking call on a thread, of which all who wait at a time share one; from one loop only.

    While Ray's head is away such calls stand still: one for each caller would take all threads.
    """

    def __init__(self, threads: Executor, call: Callable[[], T]) -> None:
        self._threads = threads
        self._call = call
        self._running: asyncio.Future[T] | None = None

    async def result(self) -> T:
        """Return what the call returns; a caller that is cancelled does not end it for others."""
        if self._running is None or self._running.done():
            loop = asyncio.get_running_loop()
            self._running = loop.run_in_executor(self._threads, self._call)
        return await asyncio.shield(self._running)


@asynccontextmanager
async def within(seconds: float | None, late: FluxError) -> AsyncIterator[None]:
    """Raise `late` if the block takes longer; a TimeoutError from inside it is passed on."""
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            yield
    except TimeoutError:
        if not deadline.expired():
            raise
        raise late from None
