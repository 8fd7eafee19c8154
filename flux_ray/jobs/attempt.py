"""Run one attempt at one job: generate it while the lease is renewed, store its images, end it.

`Attempt` does this in a worker; `outcome_of` decides what becomes of the job if the attempt fails:
another attempt after a pause, or its end. `Previews` stores previews of a running job where every
gateway finds them, so that a client may ask any of them.
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

logger = logging.getLogger("ray.serve")

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
# An attempt occupies a replica before it reads the references, so while the store cannot be
# reached, frequent attempts would waste the replica's time.
AWAY_PAUSE_S = 5.0

LOST = JobFailure("server_error", "the image could not be drawn")
# Two lost beats in a row do not end a lease; a database may be away for so long.
BEATS_PER_LEASE = 3
# Beats are also how a worker learns that its job was cancelled, and how others see its progress:
# with long leases they must not be rare.
MAX_BEAT_S = 2.0
# The assigned replica is idle while the references are read.
LOAD_S = 10.0
T = TypeVar("T")


class RetryLater(NamedTuple):
    """Try the job again in `after_s` seconds; `is_lost` if this counts towards `max_lost`."""

    after_s: float
    is_lost: bool


def outcome_of(error: BaseException | None, num_lost: int) -> RetryLater | JobFailure:
    """Decide what becomes of a job after `error` (None: its generation was cancelled).

    A full queue, a spent limit, a tier without replicas, a store that cannot be reached or a row
    that only a newer release can read is not the job's fault: it is tried again as often as needed.
    An error of the request, a result that is too large or a lack of memory would come again, so it
    ends the job. Any other error may be the job's fault or that of a dying cluster: it is tried
    again, after twice the pause each time, and counts towards `max_lost`.
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


# Returns the latest preview of the request, or None before the first.
Last = Callable[[], GeneratedImage | None]


class Previews:
    """The previews of one attempt, stored as they come. An error here never fails the job."""

    def __init__(self, lease: Lease, store: Store, results: Results, last: Last) -> None:
        self._lease = lease
        self._store = store
        self._results = results
        self._last = last
        self._num_written = 0
        self._shown: tuple[StoredImage, ...] = ()

    @asynccontextmanager
    async def shown(self, beat_s: float) -> AsyncIterator[None]:
        """Store new previews every `beat_s` seconds while open; remove them all on leaving.

        They are not removed if the block raises, cancellation included: a cancelled attempt has to
        leave at once. The cleanup then removes them with the expired job.
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
            # Earlier previews stay until the end, since clients may have their URLs.
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


# Generates the job's request on behalf of the job's owner. The request loads its references itself,
# when a replica is assigned.
Generate = Callable[[Job, ImageRequest], Awaitable[ImageResult]]
# Returns the progress of the request with that id, from 0 to 1, or None if it is not known.
ProgressOf = Callable[[str], float | None]
# Returns the latest preview of the request with that id, or None before the first.
PreviewOf = Callable[[str], GeneratedImage | None]
# Returns the place in its tier's queue of the request with that id, or None if it does not wait
# there, or this is not known.
StandingOf = Callable[[str], QueuePosition | None]


def unheard(request_id: str) -> None:
    """Return None: the default where nothing is known of running requests."""
    return None


@dataclass(frozen=True)
class WorkerContext:
    """The stores and functions that all attempts of one gateway's worker use.

    `pause_s`: seconds before a store that did not answer is asked again. `max_lost`: a job whose
    attempts were lost this many times is failed.
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
    """One attempt at a leased job, run once as a task of the worker; cancelling it is allowed.

    `is_leaving` says whether this gateway is shutting down: a job that still waits for a replica is
    then given back, for another gateway to queue it.
    """

    def __init__(
        self, lease: Lease, workshop: WorkerContext, is_leaving: Callable[[], bool] = lambda: False
    ) -> None:
        self._lease = lease
        self._shop = workshop
        self._is_leaving = is_leaving
        # Differs between attempts: one whose lease was lost may still be running at a replica, and
        # its progress and cancellation must not be mistaken for ours.
        self._request_id = f"{lease.job_id}-{lease.attempt}"

    async def run(self) -> None:
        """Work on the job until it has ended, was given back, or belongs to another worker.

        If this is cancelled, the job is given back first.
        """
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
            # End it first: another worker may take the job at once, and both would generate it.
            await end(generation)
            await self._give_back()
            raise
        finally:
            await end(generation)

    @property
    def _beat_s(self) -> float:
        return min(self._shop.store.lease_s / BEATS_PER_LEASE, MAX_BEAT_S)

    def _is_idle(self) -> bool:
        """Return whether it still waits for a replica while this gateway is shutting down."""
        return self._is_leaving() and self._shop.standing_of(self._request_id) is not None

    def _previews(self) -> AbstractAsyncContextManager[None]:
        """Return a context in which previews are stored, if the request asks for any."""
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
        """Return the request with its references.

        Raise StoreLost if the store does not answer, and ResultMissing or ValueError if the
        references are not there.
        """
        job, results = self._lease.job, self._shop.results
        try:
            async with asyncio.timeout(LOAD_S):
                blobs = await results.read_references(job.job_id, num_blobs(job.packed))
        except TimeoutError:
            raise ResultsLost(f"references took longer than {LOAD_S:g} s to read") from None
        return await asyncio.to_thread(unpack, job.packed, blobs, self._request_id)

    async def _watch(self, generation: "asyncio.Task[JobResult]") -> bool:
        """Renew the lease until the generation ends, and return True.

        Return False if the lease is lost, or if the job should be given back.
        """
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
                # Go on: if the lease ends meanwhile and another worker takes the job, the store
                # still lets only one of us finish it.
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
        """Repeat `call` until the stores answer: a generated image is not lost to an outage."""
        while True:
            try:
                return await call()
            except StoreLost as error:
                logger.warning("job %s waits for a store: %s", self._lease.job_id, error)
                await asyncio.sleep(self._shop.pause_s)


async def remove_references(results: Results, job: Job) -> None:
    """Remove the references of a job that has ended, which nobody will read any more.

    If the store does not answer, the cleanup removes them with the expired job.
    """
    try:
        await results.remove_references(job.job_id, num_blobs(job.packed))
    except ResultsLost as error:
        logger.warning("job %s keeps its reference images for now: %s", job.job_id, error)


async def end(task: "asyncio.Task[JobResult]") -> None:
    """Cancel a task and wait until it has ended, whether with a result, an error or neither."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        # Retrieve the error, or asyncio complains that nobody did.
        task.exception()
