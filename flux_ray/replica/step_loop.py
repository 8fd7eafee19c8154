"""The step loop: the one caller of the ranks, one request at a time. Knows no Ray.

Batching will replace `StepLoop`; `stream` is all that the leader sees of it.

The stages that draw a request, and which of them the ranks are sent in one call. Pure.
"""

import asyncio
import contextlib
import contextvars
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

from flux_ray.errors import FluxError, ReplicaFailed
from flux_ray.replica.job import Files, JobOutput, Observe, ReplicaJob, StageTimer
from flux_ray.replica.text_encoder import Prompts
from flux_ray.request import (
    EncodedPrompt,
    EventStream,
    ImageRequest,
    RanksDone,
    StageAnswer,
)

# What people take for at once: so late may a preview come, and so long may ranks work on for a
# client that has left. In a fifth of a millisecond a call they do not, and it costs processors.
SHORT_S = 0.1


def stages_of(request: ImageRequest) -> Iterator[str]:
    """The stages that draw a request, in order. The last one of them ends it on the ranks."""
    yield "encode"
    for _ in request.seeds:
        yield "prepare"
        for number in range(1, request.num_steps + 1):
            yield "denoise"
            if number in request.preview_steps:
                yield "preview"
        yield "decode"


def calls_of(
    stages: Iterable[str], expected_s: Callable[[str], float]
) -> Iterator[tuple[str, ...]]:
    """The stages, as many in a call as take SHORT_S together, at least one.

    Between any two calls the request may be dropped. What a stage takes is asked as late as can be:
    one that was never seen is infinite, and so goes alone.
    """
    call: list[str] = []
    left_s = SHORT_S
    for stage in stages:
        seconds = expected_s(stage)
        if call and seconds > left_s:
            yield tuple(call)
            call, left_s = [], SHORT_S
        call.append(stage)
        left_s -= seconds
    yield tuple(call)


def sizes_of(request: ImageRequest) -> tuple[int, int]:
    """What makes a request's stages long: the pixels of its canvas and of its references."""
    references = sum(raster.width * raster.height for raster in request.references)
    return request.width * request.height, references


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


class StepLoop:
    """Takes jobs in order of arrival and advances the ranks call by call.

    A job's prompt is encoded while the ranks draw the one before it, and files are made of its
    images while they draw the next one.
    """

    def __init__(
        self, ranks: Ranks, prompts: Prompts, observe: Observe, files: Files | None = None
    ) -> None:
        self._ranks = ranks
        self._prompts = prompts
        self._observe = observe
        self._files = Files() if files is None else files
        self._jobs: asyncio.Queue[ReplicaJob] = asyncio.Queue()
        # One waits here for the ranks, and one for its place: prompts are megabytes.
        self._ready: asyncio.Queue[ReplicaJob] = asyncio.Queue(maxsize=1)
        self._delivering: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        # In a request's context what the loop asks of Ray would be the request's, and Ray would
        # cancel it for all that come after.
        self.pump = asyncio.get_running_loop().create_task(
            self._run(), context=contextvars.Context()
        )

    async def stream(self, request: ImageRequest) -> EventStream:
        """Yield the request's events, then its images. Close the stream to leave.

        The loop never waits for who reads it.
        """
        if self.pump.done():
            raise ReplicaFailed("the step loop of this replica has ended")
        job = ReplicaJob(next(self._numbers), request, asyncio.get_running_loop().create_future())
        job.result.add_done_callback(lambda _: job.events.put_nowait(None))
        self._jobs.put_nowait(job)
        try:
            while (event := await job.events.get()) is not None:
                yield event
            yield job.result.result()
        finally:
            job.result.cancel()

    async def _run(self) -> None:
        """Neither ends but by a mistake of ours, and then both do."""
        encoding = asyncio.create_task(self._encode_prompts())
        generation = asyncio.create_task(self._generate_jobs())
        try:
            await asyncio.gather(encoding, generation)
        finally:
            encoding.cancel()
            generation.cancel()

    async def _encode_prompts(self) -> None:
        while True:
            job = await self._jobs.get()
            if job.has_left:
                continue
            job.began_at = time.perf_counter()
            try:
                job.encoded = await self._prompts.encode_prompt(job.request.prompt)
            except FluxError as error:
                job.finish(error)
                continue
            self._observe("prompt", time.perf_counter() - job.began_at)
            await self._ready.put(job)

    async def _generate_jobs(self) -> None:
        dropping: asyncio.Task[None] | None = None
        while True:
            free_at = time.perf_counter()
            job = await self._ready.get()
            if job.has_left:
                continue
            try:
                await self._generate(job, free_at)
            except FluxError as error:
                job.finish(error)
            if dropping is not None:
                await dropping
            # Neither its client nor the next job waits for this.
            dropping = asyncio.create_task(self._drop(job))

    async def _drop(self, job: ReplicaJob) -> None:
        """The ranks forget it, if they know it. Those of a group that is broken will end."""
        if job.is_on_ranks:
            with contextlib.suppress(FluxError):
                await self._ranks.run(job.number, ("drop",), sizes_of(job.request))

    async def _generate(self, job: ReplicaJob, free_at: float) -> None:
        """Have it drawn, and files made of its images, unless the client leaves in between.

        Of its prompt, only what the ranks waited for is time that it took them.
        """
        times = StageTimer(self._observe)
        began_at = max(free_at, job.began_at)
        times.wait(time.perf_counter() - began_at)
        gathered = JobOutput(job, self._files)
        encoded, job.encoded = job.encoded, None
        async for answers in self._answers(job, encoded):
            for stage, answer in answers:
                times.add(stage, answer.seconds)
                await gathered.take(stage, answer.value)
            gathered.tell_progress()
        if job.has_left:
            return
        job.tell(RanksDone())
        delivering = asyncio.create_task(gathered.deliver(times, began_at - job.queued_at))
        self._delivering.add(delivering)
        delivering.add_done_callback(partial(self._end_delivery, job))

    def _end_delivery(self, job: ReplicaJob, delivering: asyncio.Task[None]) -> None:
        """A mistake of ours is not to leave the client waiting for ever."""
        self._delivering.discard(delivering)
        if not delivering.cancelled() and (error := delivering.exception()) is not None:
            job.finish(error)

    async def _answers(
        self, job: ReplicaJob, encoded: EncodedPrompt | None
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
