"""When the desk of jobs works: while the gateway is served, and to the end of what it draws."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from fastapi import FastAPI
from starlette.types import Lifespan

# Of the time to drain: to give back what is not done by then, before the process is killed.
GIVE_BACK_S = 10.0
NOTICE_PERIOD_S = 0.5

# Whether this gateway has begun to end; it goes on to answer what it has taken in.
IsStopping = Callable[[], bool]


class ServiceHours(Protocol):
    """What opens and closes: a Desk."""

    async def open(self) -> None:
        """Begin to work."""

    def stop_claiming(self) -> None:
        """Leave to others what is not claimed yet."""

    async def close(self, drain_s: float) -> None:
        """See work end for `drain_s`, and leave the rest to others."""


def never() -> bool:
    """Nobody tells."""
    return False


def lifespan_of(
    desk: ServiceHours | None, drain_timeout_s: float, is_stopping: IsStopping = never
) -> Lifespan[FastAPI]:
    """Open the desk with the application, and close it so that running jobs can end.

    Serve ends an application only when its last request is answered: by then much of
    `drain_timeout_s` may be over, and the desk is to have claimed nothing meanwhile.
    """

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        if desk is None:
            yield
            return
        await desk.open()
        noticing = asyncio.create_task(notice(desk, is_stopping))
        try:
            yield
        finally:
            now_s = asyncio.get_running_loop().time()
            began_s = noticing.result() if noticing.done() else now_s
            noticing.cancel()
            await desk.close(drain_s_of(drain_timeout_s, now_s - began_s))

    return lifespan


async def notice(desk: ServiceHours, is_stopping: IsStopping) -> float:
    """Have the desk claim no more once the gateway is to end; the loop's time of that."""
    while True:
        if is_stopping():
            desk.stop_claiming()
            return asyncio.get_running_loop().time()
        await asyncio.sleep(NOTICE_PERIOD_S)


def drain_s_of(drain_timeout_s: float, passed_s: float) -> float:
    """How long running jobs may go on: a part of the time is kept for what has to follow."""
    kept_s = min(GIVE_BACK_S, drain_timeout_s / 2)
    return max(0.0, drain_timeout_s - kept_s - passed_s)
