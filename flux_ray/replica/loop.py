"""The step loop: the one caller of the ranks, one request at a time. Knows no Ray.

Batching will replace `StepLoop`; `generate` is all that the leader sees of it.
"""

import asyncio
import contextlib
import contextvars
import itertools
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from flux_ray.errors import FluxError, ReplicaFailed
from flux_ray.replica.prompts import Prompts
from flux_ray.replica.stages import calls_of, sizes_of, stages_of
from flux_ray.request import (
    Encoded,
    EncodedPrompt,
    Finished,
    GeneratedImage,
    Hear,
    ImageRequest,
    ImageResult,
    News,
    Preview,
    Progress,
    StageAnswer,
    StageTimes,
)

Observe = Callable[[str, float], None]

# Calls that the ranks have at a time. The second is there when they have done the first, and they
# do not wait for the leader to read that. One more would be a step more that is made for a client
# that has left.
NUM_IN_FLIGHT = 2


class Ranks(Protocol):
    """The same stages of a job on every rank, answered by rank 0. Raises FluxError only.

    Calls begin and end in the order in which they were made. After one that raised, the job's
    others raise too. `payload`, the request and its prompt where that was encoded elsewhere, comes
    with the first.
    """

    async def run(
        self, job: int, stages: tuple[str, ...], sizes: tuple[int, ...], *payload: object
    ) -> list[StageAnswer]: ...

    def longest_s(self, stage: str, sizes: tuple[int, ...]) -> float:
        """What the longest of the last such stages took; infinite for one that was never seen."""


@dataclass(eq=False)
class Job:
    """A request in this replica. A client that leaves cancels `result`; nothing else does."""

    number: int
    request: ImageRequest
    result: asyncio.Future[ImageResult]
    hear: Hear | None = None
    queued_at: float = field(default_factory=time.perf_counter)
    is_on_ranks: bool = False

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


class Stopwatch:
    """Seconds by stage, and each of them told to `observe`."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, stage: str, seconds: float) -> None:
        """One more of them."""
        self._seconds[stage] += seconds
        self._observe(stage, seconds)

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
        self._num_previews = self._num_done = self._num_told = 0

    def take(self, stage: str, value: object) -> None:
        """One more answer."""
        if isinstance(value, Encoded):
            self.said = value
        elif stage == "denoise":
            self._num_done += 1
        elif isinstance(value, GeneratedImage) and stage == "preview":
            self._tell(Preview(self._job.request.tier, value, self._num_previews))
            self._num_previews += 1
        elif isinstance(value, GeneratedImage):
            if len(self.images) + 1 < self._job.request.num_images:
                # Who streams is sent it now; the last one is in the result anyway.
                self._tell(Finished(self._job.request.tier, value, len(self.images)))
            self.images.append(value)

    def tell_progress(self) -> None:
        """How far it is now. Steps that are answered at once would look as if they took no time."""
        if self._num_done > self._num_told:
            self._num_told = self._num_done
            self._tell(Progress(self._num_done, self._job.request.num_denoise_steps))

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
        # In a request's context what the loop asks of Ray would be the request's, and Ray would
        # cancel it for all that come after.
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
        if job.is_on_ranks:
            with contextlib.suppress(FluxError):
                await self._ranks.run(job.number, ("drop",), sizes_of(job.request))

    async def _draw(self, job: Job) -> ImageResult | None:
        """The result, or None if the client left in between."""
        request, times = job.request, Stopwatch(self._observe)
        queue_s = time.perf_counter() - job.queued_at
        began = time.perf_counter()
        encoded = await self._prompts.encode_prompt(request.prompt)
        times.add("prompt", time.perf_counter() - began)
        gathered = Gathering(job)
        async for answers in self._answers(job, encoded):
            for stage, answer in answers:
                times.add(stage, answer.seconds)
                gathered.take(stage, answer.value)
            gathered.tell_progress()
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
        self, job: Job, encoded: EncodedPrompt | None
    ) -> AsyncIterator[list[tuple[str, StageAnswer]]]:
        """What the ranks say to each stage, call by call, until the client has left.

        Calls are sent ahead.
        """
        sizes = sizes_of(job.request)
        calls = calls_of(stages_of(job.request), lambda stage: self._ranks.longest_s(stage, sizes))
        payload: tuple[object, ...] = (job.request, encoded)
        in_flight: deque[tuple[tuple[str, ...], asyncio.Task[list[StageAnswer]]]] = deque()
        try:
            while not job.has_left:
                for stages in itertools.islice(calls, NUM_IN_FLIGHT - len(in_flight)):
                    call = self._ranks.run(job.number, stages, sizes, *payload)
                    in_flight.append((stages, asyncio.create_task(call)))
                    job.is_on_ranks, payload = True, ()
                if not in_flight:
                    job.is_on_ranks = False
                    return
                stages, answers = in_flight.popleft()
                yield list(zip(stages, await answers, strict=True))
        finally:
            # After a failure, or of a client that has left: asyncio complains of errors unheard.
            await asyncio.gather(*(call for _, call in in_flight), return_exceptions=True)
