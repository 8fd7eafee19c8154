"""The step loop: the one caller of the ranks, one request at a time. Knows no Ray.

Batching will replace `StepLoop` and `calls_for`; `generate` is all that the leader sees of them.
"""

import asyncio
import contextlib
import contextvars
import itertools
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from flux_ray.errors import FluxError, ReplicaFailed
from flux_ray.replica.prompts import Prompts
from flux_ray.request import (
    Encoded,
    GeneratedImage,
    Hear,
    ImageRequest,
    ImageResult,
    News,
    Preview,
    Progress,
    StageTimes,
)

Observe = Callable[[str, float], None]
Call = tuple[str, *tuple[object, ...]]

# Calls that the ranks have at a time. The second is there when they have done the first, or a
# short step would wait as long for its call as it takes. One more would be a step more that is
# made for a client that has left.
NUM_IN_FLIGHT = 2


class Ranks(Protocol):
    """The same call on every rank, answered by rank 0. Raises FluxError only.

    Calls begin and end in the order in which they were made. After one that raised, the job's
    others raise too.
    """

    async def call(self, method: str, sizes: tuple[int, ...], *args: object) -> object: ...


@dataclass(eq=False)
class Job:
    """A request in this replica. A client that leaves cancels `result`; nothing else does."""

    number: int
    request: ImageRequest
    result: asyncio.Future[ImageResult]
    hear: Hear | None = None
    queued_at: float = field(default_factory=time.perf_counter)
    has_begun: bool = False

    @property
    def has_left(self) -> bool:
        """Whether nobody waits for the result any more."""
        return self.result.done()

    def finish(self, outcome: ImageResult | FluxError | None) -> None:
        """Tell the client, if it is still there."""
        if self.has_left or outcome is None:
            return
        if isinstance(outcome, FluxError):
            self.result.set_exception(outcome)
        else:
            self.result.set_result(outcome)


def calls_for(request: ImageRequest, encoded: object) -> Iterator[Call]:
    """The calls that draw a request, in order; between any two of them it may be dropped."""
    yield "encode", request, encoded
    for seed in request.seeds:
        yield "prepare", seed
        for number in range(1, request.num_steps + 1):
            yield ("denoise",)
            if number in request.preview_steps:
                yield ("preview",)
        yield ("decode",)


def sizes_of(request: ImageRequest) -> tuple[int, int]:
    """What makes a request's calls long: the pixels of its canvas and of its references."""
    references = sum(raster.width * raster.height for raster in request.references)
    return request.width * request.height, references


class Stopwatch:
    """Seconds by method, and each of them told to `observe`."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._seconds: dict[str, float] = defaultdict(float)

    async def measure(self, method: str, call: Awaitable[object]) -> object:
        """The call's answer. Of one sent ahead, the time from now: the former has ended."""
        began = time.perf_counter()
        answer = await call
        seconds = time.perf_counter() - began
        self._seconds[method] += seconds
        self._observe(method, seconds)
        return answer

    def total(self, queue_s: float, is_cached: bool) -> StageTimes:
        """The times of a request; preparing noise counts as encoding."""
        spent = self._seconds
        decode_s = spent["preview"] + spent["decode"]
        encode_s = spent["prompt"] + spent["encode"] + spent["prepare"]
        return StageTimes(queue_s, encode_s, spent["denoise"], decode_s, is_cached)


class Gathering:
    """What the ranks have answered of a job; its client hears of it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.images: list[GeneratedImage] = []
        self.said = Encoded((), is_cached=False)
        self._num_previews = self._num_done = 0

    def take(self, method: str, answer: object) -> None:
        """One more answer."""
        if isinstance(answer, Encoded):
            self.said = answer
        elif method == "denoise":
            self._num_done += 1
            self._tell(Progress(self._num_done, self._job.request.num_denoise_steps))
        elif isinstance(answer, GeneratedImage) and method == "preview":
            self._tell(Preview(self._job.request.tier, answer, self._num_previews))
            self._num_previews += 1
        elif isinstance(answer, GeneratedImage):
            self.images.append(answer)

    def _tell(self, news: News) -> None:
        if self._job.hear is not None and not self._job.has_left:
            self._job.hear(news)


class StepLoop:
    """Takes jobs in order of arrival and advances the ranks call by call."""

    def __init__(self, ranks: Ranks, prompts: Prompts, observe: Observe) -> None:
        self._ranks = ranks
        self._prompts = prompts
        self._observe = observe
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._numbers = itertools.count(1)
        # In a request's context the rank calls would be its children, and Ray would cancel them
        # with it: on one rank only, perhaps, and the ranks would run different jobs from then on.
        self.pump = asyncio.get_running_loop().create_task(
            self._run(), context=contextvars.Context()
        )

    async def generate(self, request: ImageRequest, hear: Hear | None = None) -> ImageResult:
        """The request's pictures; cancel the call to leave. `hear` is told how they come along."""
        if self.pump.done():
            raise ReplicaFailed("the step loop of this replica has ended")
        job = Job(next(self._numbers), request, asyncio.get_running_loop().create_future(), hear)
        self._jobs.put_nowait(job)
        return await job.result

    async def _run(self) -> None:
        dropping: asyncio.Task[None] | None = None
        while True:
            job = await self._jobs.get()
            if job.has_left:
                continue
            try:
                job.finish(await self._draw(job))
            except FluxError as error:
                job.finish(error)
            if dropping is not None:
                await dropping
            # Neither its client nor the next job waits for this.
            dropping = asyncio.create_task(self._drop(job))

    async def _drop(self, job: Job) -> None:
        """The ranks forget it, if they know it. Those of a group that is broken will end."""
        if not job.has_begun:
            return
        with contextlib.suppress(FluxError):
            await self._ranks.call("drop", sizes_of(job.request), job.number)

    async def _draw(self, job: Job) -> ImageResult | None:
        """The result, or None if the client left in between."""
        request, times = job.request, Stopwatch(self._observe)
        queue_s = time.perf_counter() - job.queued_at
        encoded = await times.measure("prompt", self._prompts.encode_prompt(request.prompt))
        gathered = Gathering(job)
        async for method, answer in self._answers(job, calls_for(request, encoded), times):
            gathered.take(method, answer)
        if job.has_left:
            return None
        return ImageResult(
            request.request_id,
            request.tier,
            tuple(gathered.images),
            times.total(queue_s, gathered.said.is_cached),
            gathered.said.warnings,
        )

    async def _answers(
        self, job: Job, calls: Iterator[Call], times: Stopwatch
    ) -> AsyncIterator[tuple[str, object]]:
        """What the ranks say to each method, until the client has left. Calls are sent ahead."""
        sizes = sizes_of(job.request)
        in_flight: deque[tuple[str, asyncio.Task[object]]] = deque()
        try:
            while not job.has_left:
                for method, *args in itertools.islice(calls, NUM_IN_FLIGHT - len(in_flight)):
                    job.has_begun = True
                    call = self._ranks.call(method, sizes, job.number, *args)
                    in_flight.append((method, asyncio.create_task(call)))
                if not in_flight:
                    return
                method, answer = in_flight.popleft()
                yield method, await times.measure(method, answer)
        finally:
            # After a failure, or of a client that has left: asyncio complains of errors unheard.
            await asyncio.gather(*(call for _, call in in_flight), return_exceptions=True)
