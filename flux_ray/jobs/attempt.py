"""One attempt at one job: draw it while the lease is kept, keep its images, end it.

What becomes of a job whose attempt failed: another one, after a pause, or its end.

Shows what a job will look like while it is drawn, where any gateway finds it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

from flux_ray.errors import (
    FluxError,
    OutOfMemory,
    Overloaded,
    RateLimited,
    ResultsLost,
    StoreLost,
    TierUnavailable,
)
from flux_ray.jobs.images import Results, ResultTooLarge
from flux_ray.jobs.job import Job, JobFailure, JobResult, Lease, StoredImage
from flux_ray.jobs.lease_worker import spawn
from flux_ray.jobs.serialization import Unreadable, defer, num_blobs, unpack
from flux_ray.jobs.store import Store
from flux_ray.request import GeneratedImage, ImageRequest, ImageResult, QueuePosition

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
# Each attempt takes a replica's turn before it reads: not too often while a store is away.
AWAY_PAUSE_S = 5.0

LOST = JobFailure("server_error", "the image could not be drawn")


class RetryLater(NamedTuple):
    """Another attempt, so much later; `is_lost` if it counts against the job."""

    after_s: float
    is_lost: bool


def outcome_of(error: BaseException | None, num_lost: int) -> RetryLater | JobFailure:
    """After `error` in an attempt (None: it was cancelled from within).

    A job waits for its turn as long as that takes, and for its references as long as their store is
    away. What may be the job's own fault is tried again
    too, as a whole cluster may have died under it; how often, the worker decides by `num_lost`.
    What needs more memory than a card has would need it again: that is its end.
    """
    if isinstance(error, (Overloaded, RateLimited, TierUnavailable)):
        return RetryLater(float(error.retry_after_s or FIRST_PAUSE_S), is_lost=False)
    if isinstance(error, Unreadable):
        return RetryLater(MAX_PAUSE_S, is_lost=False)
    if isinstance(error, StoreLost):
        return RetryLater(AWAY_PAUSE_S, is_lost=False)
    if isinstance(error, OutOfMemory) or (isinstance(error, FluxError) and error.status < 500):
        return JobFailure(error.code, error.message)
    if isinstance(error, ResultTooLarge):
        return LOST
    return RetryLater(min(FIRST_PAUSE_S * 2**num_lost, MAX_PAUSE_S), is_lost=True)


logger = logging.getLogger("ray.serve")

# The last one that was heard of, if there is one.
Last = Callable[[], GeneratedImage | None]


class Previews:
    """Of one attempt. What fails here costs a preview, and never the job."""

    def __init__(self, lease: Lease, store: Store, results: Results, last: Last) -> None:
        self._lease = lease
        self._store = store
        self._results = results
        self._last = last
        self._num_written = 0
        self._shown: tuple[StoredImage, ...] = ()

    @asynccontextmanager
    async def shown(self, beat_s: float) -> AsyncIterator[None]:
        """While this is open: looked for at each beat, and removed at its end.

        Who is cancelled is to leave at once: what stays goes when the job has expired.
        """
        showing = spawn(self._show_on(beat_s))
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.wait({showing})
        await self._remove()

    async def _show_on(self, beat_s: float) -> None:
        seen: GeneratedImage | None = None
        while True:
            await asyncio.sleep(beat_s)
            if (image := self._last()) is not None and image is not seen:
                seen = image
                await self._show(image)

    async def _show(self, image: GeneratedImage) -> None:
        job = self._lease.job
        number, self._num_written = self._num_written, self._num_written + 1
        try:
            stored = await self._results.write_preview(
                job.job_id, job.attempt, number, image, job.packed["encoding"]["format"]
            )
            # Those before it stay: somebody may have their URLs.
            self._shown += (stored,)
            await self._store.show(self._lease, self._shown)
        except (StoreLost, ResultTooLarge) as error:
            logger.warning("job %s is not previewed: %s", job.job_id, error)

    async def _remove(self) -> None:
        job = self._lease.job
        form = job.packed["encoding"]["format"]
        try:
            await self._results.remove_previews(job.job_id, job.attempt, self._num_written, form)
        except StoreLost as error:
            logger.warning("job %s keeps its previews for now: %s", job.job_id, error)


# A lease outlives two beats that were lost.
BEATS_PER_LEASE = 3
# At a beat a job that was cancelled elsewhere ends, and others see how far it has come.
MAX_BEAT_S = 2.0

# A replica waits meanwhile.
LOAD_S = 10.0

# Draws the job's request, for the job's owner; its references are there when it is loaded.
Generate = Callable[[Job, ImageRequest], Awaitable[ImageResult]]
# How far a request has come, from 0 to 1, by its id; None if nobody knows.
ProgressOf = Callable[[str], float | None]
# What it will look like, by its id; None as long as nobody knows.
PreviewOf = Callable[[str], GeneratedImage | None]
# Where it stands in its tier's queue, by its id; None if it does not wait, or nobody knows.
StandingOf = Callable[[str], QueuePosition | None]
T = TypeVar("T")


def unheard(request_id: str) -> None:
    """Nobody knows."""
    return None


@dataclass(frozen=True)
class WorkerContext:
    """What every attempt works with.

    `pause_s`: before a store that is away is asked again. `max_lost`: a job that was lost so often
    is given up.
    """

    store: Store
    results: Results
    generate: Generate
    progress_of: ProgressOf = unheard
    preview_of: PreviewOf = unheard
    pause_s: float = 1.0
    max_lost: int = 5
    standing_of: StandingOf = unheard


class Attempt:
    """Cancel run() and the job is given back.

    `is_leaving`: its gateway ends, and is not to wait for what others may begin as well.
    """

    def __init__(
        self, lease: Lease, workshop: WorkerContext, is_leaving: Callable[[], bool] = lambda: False
    ) -> None:
        self._lease = lease
        self._shop = workshop
        self._is_leaving = is_leaving
        # Of no other attempt: one whose lease was lost may still be drawn somewhere.
        self._request_id = f"{lease.job_id}-{lease.attempt}"

    async def run(self) -> None:
        """Until the job has ended, or is another's."""
        lease = self._lease
        if lease.job.num_lost >= self._shop.max_lost:
            logger.error("job %s is given up: it was lost too often", lease.job_id)
            await self._fail(LOST)
            return
        generation = asyncio.create_task(self._generate())
        try:
            async with self._previews():
                if await self._watch(generation):
                    await self._conclude(generation)
                elif self._is_idle():
                    await end(generation)
                    await self._give_back()
                else:
                    logger.info("job %s was cancelled, or is another worker's", lease.job_id)
        except asyncio.CancelledError:
            # First: another would have it drawn at the same time.
            await end(generation)
            await self._give_back()
            raise
        finally:
            await end(generation)

    @property
    def _beat_s(self) -> float:
        return min(self._shop.store.lease_s / BEATS_PER_LEASE, MAX_BEAT_S)

    def _is_idle(self) -> bool:
        """It only waits for a replica, at a gateway that ends."""
        return self._is_leaving() and self._shop.standing_of(self._request_id) is not None

    def _previews(self) -> AbstractAsyncContextManager[None]:
        """They are shown while this is open, if the request asks for any."""
        lease, shop = self._lease, self._shop
        if not lease.job.packed.get("num_previews"):
            return nullcontext()
        previews = Previews(
            lease, shop.store, shop.results, lambda: shop.preview_of(self._request_id)
        )
        return previews.shown(self._beat_s)

    async def _generate(self) -> JobResult:
        job, results = self._lease.job, self._shop.results
        request = defer(job.packed, self._request_id, self._load)
        generated = await self._shop.generate(job, request)
        images = await self._insist(
            lambda: results.write_images(
                job.job_id, job.attempt, generated.images, request.encoding.format
            )
        )
        return JobResult(images, asdict(generated.times), generated.warnings)

    async def _load(self) -> ImageRequest:
        """The whole request. Raises StoreLost; ResultMissing or ValueError if it is not there."""
        job, results = self._lease.job, self._shop.results
        try:
            async with asyncio.timeout(LOAD_S):
                blobs = await results.read_references(job.job_id, num_blobs(job.packed))
        except TimeoutError:
            raise ResultsLost(f"references took longer than {LOAD_S:g} s to read") from None
        return await asyncio.to_thread(unpack, job.packed, blobs, self._request_id)

    async def _watch(self, generation: "asyncio.Task[JobResult]") -> bool:
        """Beat until it is drawn; False if the lease is lost, or is to be given back."""
        shop, request_id = self._shop, self._request_id
        while True:
            done, _ = await asyncio.wait({generation}, timeout=self._beat_s)
            if done:
                return True
            if self._is_idle():
                return False
            try:
                progress, standing = shop.progress_of(request_id), shop.standing_of(request_id)
                if not await shop.store.beat(self._lease, progress, standing):
                    return False
            except StoreLost as error:
                # Whoever takes the job meanwhile: only one of us can finish it.
                logger.warning("job %s has no beat: %s", self._lease.job_id, error)

    async def _conclude(self, generation: "asyncio.Task[JobResult]") -> None:
        lease, store = self._lease, self._shop.store
        error = None if generation.cancelled() else generation.exception()
        if error is None and not generation.cancelled():
            if await self._insist(lambda: store.finish(lease, generation.result())):
                await remove_references(self._shop.results, lease.job)
            return
        if not isinstance(error, FluxError):
            logger.error("job %s: attempt %d failed", lease.job_id, lease.attempt, exc_info=error)
        outcome = outcome_of(error, lease.job.num_lost)
        if isinstance(outcome, RetryLater):
            await self._insist(lambda: store.give_back(lease, outcome.after_s, outcome.is_lost))
        else:
            await self._fail(outcome)

    async def _fail(self, failure: JobFailure) -> None:
        if await self._insist(lambda: self._shop.store.fail(self._lease, failure)):
            await remove_references(self._shop.results, self._lease.job)

    async def _give_back(self) -> None:
        try:
            await self._shop.store.give_back(self._lease)
        except StoreLost as error:
            logger.warning("job %s waits for its lease to end: %s", self._lease.job_id, error)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Ask until the stores answer: a drawn image is not given up for an outage."""
        while True:
            try:
                return await call()
            except StoreLost as error:
                logger.warning("job %s waits for a store: %s", self._lease.job_id, error)
                await asyncio.sleep(self._shop.pause_s)


async def remove_references(results: Results, job: Job) -> None:
    """Nobody reads them after the job's end; what stays here goes when the job has expired."""
    try:
        await results.remove_references(job.job_id, num_blobs(job.packed))
    except ResultsLost as error:
        logger.warning("job %s keeps its reference images for now: %s", job.job_id, error)


async def end(task: "asyncio.Task[JobResult]") -> None:
    """Cancel it and see it end, however it does."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        # Looked at, or asyncio complains of an error that nobody saw.
        task.exception()
