"""What a replica draws for requests that may come again, and for a while what it has drawn."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from flux_ray.errors import NotKept
from flux_ray.request import Draw, Finished, Hear, ImageResult, News


@dataclass(eq=False)
class RunningRequest:
    """A request while it is drawn, and those who wait for it."""

    drawing: asyncio.Task[ImageResult] | None = None
    hearing: list[Hear] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    num_waiting: int = 0

    def tell(self, news: News) -> None:
        """Let all of them hear it."""
        if isinstance(news, Finished):
            self.finished.append(news)
        for hear in self.hearing:
            hear(news)


class RunningRequests:
    """Draws, and keeps results of up to `max_bytes`, each for `keep_s` seconds.

    Whoever waits for a run may leave by being cancelled, and the last one ends it. A gateway that
    dies cancels nothing: its runs go on, and their results are there for who asks again.
    """

    def __init__(
        self, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._clock = clock
        self._running: dict[str, RunningRequest] = {}
        # Until when, by name, in that order.
        self._kept: dict[str, tuple[float, ImageResult]] = {}
        self._num_bytes = 0

    async def draw(self, name: str, draw: Draw, hear: Hear | None) -> ImageResult:
        """Draw a request under that name: the last run of a name is the one that is found."""
        run = RunningRequest()
        run.drawing = asyncio.ensure_future(draw(run.tell))
        self._running[name] = run
        self._drop(name)
        run.drawing.add_done_callback(partial(self._end, name, run))
        return await self._wait(run, hear)

    async def recall(self, name: str, hear: Hear | None) -> ImageResult:
        """The result of the last run of that name, as soon as it is there; NotKept if none is."""
        self.forget()
        if name in self._kept:
            return self._kept[name][1]
        run = self._running.get(name)
        # One that everybody left is about to end.
        if run is None or not run.num_waiting:
            raise NotKept("this replica does not have the images, or not any more")
        return await self._wait(run, hear)

    def forget(self) -> None:
        """Drop what has been kept for long enough."""
        while self._kept:
            name, (until, _) = next(iter(self._kept.items()))
            if until > self._clock() and self._num_bytes <= self._max_bytes:
                return
            self._drop(name)

    async def _wait(self, run: RunningRequest, hear: Hear | None) -> ImageResult:
        assert run.drawing is not None
        if hear is not None:
            for news in run.finished:
                hear(news)
            run.hearing.append(hear)
        run.num_waiting += 1
        try:
            return await asyncio.shield(run.drawing)
        finally:
            run.num_waiting -= 1
            if hear is not None:
                run.hearing.remove(hear)
            if not run.num_waiting:
                run.drawing.cancel()

    def _end(self, name: str, run: RunningRequest, drawing: asyncio.Task[ImageResult]) -> None:
        """Keep what was drawn; of what was not, the next one is to be drawn anew."""
        # Asking for the error too: nobody else may, and asyncio complains of errors unheard.
        is_drawn = not drawing.cancelled() and drawing.exception() is None
        if self._running.get(name) is not run:
            return
        del self._running[name]
        if not is_drawn:
            return
        result = drawing.result()
        self._kept[name] = (self._clock() + self._keep_s, result)
        self._num_bytes += num_bytes(result)
        self.forget()
        asyncio.get_running_loop().call_later(self._keep_s, self.forget)

    def _drop(self, name: str) -> None:
        if name in self._kept:
            _, result = self._kept.pop(name)
            self._num_bytes -= num_bytes(result)


def num_bytes(result: ImageResult) -> int:
    """What it takes to keep it."""
    return sum(len(image.data) for image in result.images)
