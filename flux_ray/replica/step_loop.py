"""The step loop of a replica: it calls the ranks, stage by stage, for one request at a time.

`stages_of` lists the stages of a request, and `calls_of` groups them into calls of the ranks; both
are pure functions. `StepLoop` runs the jobs; the leader uses only its `stream` and `pump`, so that
a loop with batches of requests can replace it. Nothing here knows Ray.
"""

import asyncio
import contextlib
import contextvars
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

from flux_ray.errors import FluxError, ReplicaFailed
from flux_ray.replica.job import Files, JobOutput, Observe, ReplicaJob, StageTimer
from flux_ray.replica.text_encoder import Prompts
from flux_ray.request import EventStream, ImageRequest, RanksDone
from flux_ray.stages import EncodedPrompt, StageAnswer
from flux_ray.tracing import REPLICA_QUEUE

logger = logging.getLogger("ray.serve")

# Seconds of work in one call. People take 0.1 s for "at once": a preview may come so late, and the
# ranks may work so long for a client that has left. With much shorter calls nobody would see a
# difference, but each one costs the CPU 0.2 ms.
SHORT_S = 0.1


def stages_of(request: ImageRequest) -> Iterator[str]:
    """Yield the stages of a request in order; after the last one the ranks forget the job."""
    yield "encode"
    for _ in request.seeds:
        yield "prepare"
        for number in range(1, request.num_steps_made + 1):
            yield "denoise"
            if number in request.preview_steps:
                yield "preview"
        yield "decode"


def calls_of(
    stages: Iterable[str], expected_s: Callable[[str], float]
) -> Iterator[tuple[str, ...]]:
    """Yield the stages grouped into calls of up to SHORT_S, or of a single longer stage.

    Between two calls the request may be dropped. `expected_s` is asked for the seconds of a stage
    only when its call is made, by when more is known; it is infinite for a stage that was never
    seen, which therefore has a call of its own.
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
    """Return what a request's stages take time for: pixels of an image, and of all references."""
    references = sum(raster.width * raster.height for raster in request.references)
    return request.width * request.height, references


# Calls that the ranks have at a time. With a second one they need not wait until the leader has
# read the answer to the first. A third would only be more work for a client that has left.
NUM_IN_FLIGHT = 2


class Ranks(Protocol):
    """The methods of `RankGroup` that the step loop uses; tests have fakes of it.

    `run` runs stages of a job on every rank and returns rank 0's answers; it raises only FluxError.
    Calls begin and end in the order in which they were made, and once one has raised, the job's
    later ones raise too. `payload` comes with a job's first call: the request, and its prompt if
    the shared text encoder has encoded it.
    """

    async def run(
        self, job: int, stages: tuple[str, ...], sizes: tuple[int, ...], *payload: object
    ) -> list[StageAnswer]: ...

    def longest_s(self, stage: str, sizes: tuple[int, ...]) -> float:
        """Return the seconds of the longest recent stage of that kind and size; inf if none."""


class StepLoop:
    """A pipeline that runs jobs in the order of their arrival, from prompt to files.

    While the ranks work on one job, the next one's prompt is encoded and files are made of the
    images of the one before. `pump` is the task that does it, on the leader's event loop; it ends
    only by a bug.
    """

    def __init__(
        self, ranks: Ranks, prompts: Prompts, observe: Observe, files: Files | None = None
    ) -> None:
        self._ranks = ranks
        self._prompts = prompts
        self._observe = observe
        self._files = Files() if files is None else files
        self._jobs: asyncio.Queue[ReplicaJob] = asyncio.Queue()
        # One encoded job waits here, and another one to be put here. No more: encoded prompts are
        # megabytes.
        self._ready: asyncio.Queue[ReplicaJob] = asyncio.Queue(maxsize=1)
        self._delivering: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        # An empty context: in that of a request, Ray would take the loop's calls for the request's,
        # and cancel them with it, for all requests that come after.
        self.pump = asyncio.get_running_loop().create_task(
            self._run(), context=contextvars.Context()
        )

    async def stream(self, request: ImageRequest) -> EventStream:
        """Yield the request's events, then its result; close the stream to cancel the request.

        The loop never waits for the reader. Raise the error that the request failed with.
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
        """Run both loops. They end only by a bug in one of them, and then both end."""
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
                job.encoded = await self._prompts.encode_prompts(job.request.prompts)
            except FluxError as error:
                logger.warning("request %s has no prompt: %s", job.request.request_id, error)
                job.finish(error)
                continue
            encoded_at = time.perf_counter()
            self._observe("prompt", encoded_at - job.began_at)
            if job.encoded:
                job.spans.wait(REPLICA_QUEUE, job.began_at)
                job.spans.wait("prompt", encoded_at)
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
                job.spans.close()
                logger.warning("request %s failed: %s", job.request.request_id, error)
                job.finish(error)
            if dropping is not None:
                await dropping
            # A task of its own, so that neither this job's client nor the next job waits for it.
            dropping = asyncio.create_task(self._drop(job))

    async def _drop(self, job: ReplicaJob) -> None:
        """Have the ranks forget a job that ended before its last stage.

        An error means that the group is broken, and its ranks end anyway.
        """
        if job.is_on_ranks:
            with contextlib.suppress(FluxError):
                await self._ranks.run(job.number, ("drop",), sizes_of(job.request))

    async def _generate(self, job: ReplicaJob, free_at: float) -> None:
        """Run the job's stages, then start a task that makes files and finishes the job.

        Stop early if the client leaves. `free_at`: when the ranks became free; only the encoding of
        the prompt after that counts as their time.
        """
        job.spans.wait(REPLICA_QUEUE, time.perf_counter())
        times = StageTimer(self._observe)
        began_at = max(free_at, job.began_at)
        times.wait(time.perf_counter() - began_at)
        gathered = JobOutput(job, self._files)
        encoded, job.encoded = job.encoded, ()
        async for answers in self._answers(job, encoded):
            took = [(stage, answer.seconds) for stage, answer in answers]
            job.spans.answer(took, time.perf_counter())
            for stage, answer in answers:
                times.add(stage, answer.seconds)
                await gathered.take(stage, answer.value)
            gathered.tell_progress()
        job.spans.close()
        if job.has_left:
            return
        job.tell(RanksDone())
        delivering = asyncio.create_task(gathered.deliver(times, began_at - job.queued_at))
        self._delivering.add(delivering)
        delivering.add_done_callback(partial(self._end_delivery, job))

    def _end_delivery(self, job: ReplicaJob, delivering: asyncio.Task[None]) -> None:
        """Give the client the error of a delivery that failed by a bug: it would wait for ever."""
        self._delivering.discard(delivering)
        if not delivering.cancelled() and (error := delivering.exception()) is not None:
            job.finish(error)

    async def _answers(
        self, job: ReplicaJob, encoded: tuple[EncodedPrompt, ...]
    ) -> AsyncIterator[list[tuple[str, StageAnswer]]]:
        """Yield the stages of each call with the ranks' answers, until the client has left.

        Up to NUM_IN_FLIGHT calls are sent before the first of them is answered.
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
            # Await the rest, after a failure or when the client has left: the next job's calls come
            # after them, and asyncio complains of errors that nobody retrieved.
            await asyncio.gather(*(call for _, call in in_flight), return_exceptions=True)
