"""The desk at which dialects hand jobs in and ask for them, at any gateway.

Takes offers in: a job is accepted when its row and its reference images are kept.
"""

import asyncio
import logging
from collections.abc import Collection

from flux_ray.config.gateway import JobArgs
from flux_ray.errors import StoreLost
from flux_ray.jobs.attempt import (
    Generate,
    PreviewOf,
    ProgressOf,
    StandingOf,
    WorkerContext,
    remove_references,
    unheard,
)
from flux_ray.jobs.cleanup import PERIOD_S, Abandoned, keep_clean
from flux_ray.jobs.database import Database, shared_secret
from flux_ray.jobs.images import ImageStore, Results
from flux_ray.jobs.job import Idempotency, Job, JobSubmission, ListPlace, Status, StoredImage
from flux_ray.jobs.lease_worker import repeat, spawn
from flux_ray.jobs.serialization import compress, pack
from flux_ray.jobs.store import Store
from flux_ray.jobs.webhooks import Mail, WebhookOutbox, WebhookWorker
from flux_ray.jobs.worker import Worker
from flux_ray.request import ImageRequest, ImageResult


async def accept(store: Store, results: Results, offer: JobSubmission) -> Job:
    """The job, which from now on is never lost.

    Raises KeyReused, RateLimited, StoreLost, ResultsLost and ResultTooLarge: it was not accepted,
    or that is not known; offered again with its idempotency key, it is the same job.
    """
    packed = await asyncio.to_thread(pack, offer.request)
    job = await store.accept(offer, packed.row, is_whole=not packed.images)
    if job.status != "arriving":
        return job
    # The gateway that was at it before may be gone: the images are the same.
    await results.write_references(job.job_id, packed.images, compress)
    admitted = await store.admit(job.job_id)
    if admitted is None:
        raise StoreLost("the reference images took too long to be stored")
    return admitted


logger = logging.getLogger("ray.serve")

PASS_RETRY_S = 2.0


class JobService:
    """The jobs of one gateway's args, with a worker that has them drawn by `generate`.

    `mail`: how their ends are told of to webhooks; without it that is left to other gateways.
    `tiers`: jobs of others are left to other gateways too.
    Unless said otherwise, everything raises StoreLost.
    """

    def __init__(
        self,
        args: JobArgs,
        generate: Generate,
        progress_of: ProgressOf = unheard,
        mail: Mail | None = None,
        preview_of: PreviewOf = unheard,
        standing_of: StandingOf = unheard,
        tiers: Collection[str] | None = None,
    ) -> None:
        self._database = Database(args.database)
        self._store = Store(self._database, args.lease_s, args.keep_s)
        self._results = Results(args.results, args.results_options)
        self._shelf = ImageStore(self._database, self._results, args.keep_s)
        # Of the database that it was read from, by how often that was renewed.
        self._url_secrets: dict[int, bytes] = {}
        workshop = WorkerContext(
            self._store,
            self._results,
            generate,
            progress_of,
            preview_of,
            max_lost=args.max_lost,
            standing_of=standing_of,
        )
        self._worker = Worker(workshop, args.max_running, tiers=tiers)
        self._postman: WebhookWorker | None = None
        if mail is not None:
            mailbox = WebhookOutbox(self._database, mail.lease_s)
            self._postman = WebhookWorker(mailbox, mail, args.webhook_retries_s, args.max_lost)
        self._abandoned = Abandoned(self._database, self._store, tiers, args.keep_s)
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Make what is missing, and begin to work: later, if the database is away."""
        try:
            await self._begin()
        except StoreLost as error:
            logger.warning("jobs cannot be taken yet: %s", error)
            self._tasks.append(spawn(self._begin_later()))

    def stop_claiming(self) -> None:
        """Leave what is not claimed yet to other gateways; all else goes on."""
        self._worker.stop_claiming()

    async def close(self, drain_s: float = 0.0) -> None:
        """See jobs end for `drain_s`, and leave the rest to other gateways."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + drain_s
        await self._worker.stop(drain_s)
        if self._postman is not None:
            # Last: of jobs that ended meanwhile it tells too.
            await self._postman.stop(until_s - loop.time())
        for task in self._tasks:
            task.cancel()
            await asyncio.wait({task})
        await self._database.close()

    async def accept(self, offer: JobSubmission) -> Job:
        """As acceptance.accept; drawn at once where there is a worker for it."""
        job = await accept(self._store, self._results, offer)
        self._worker.wake()
        return job

    async def known(self, owner: str, idempotency: Idempotency) -> Job | None:
        """The job that the owner has handed in under that name. Raises KeyReused."""
        job = await self._store.known(owner, idempotency)
        # Of one that has not come in whole, the offer is to be made again.
        return None if job is None or job.status == "arriving" else job

    async def find(self, owner: str, job_id: str) -> Job | None:
        """The owner's job; other people's are as if they were not there."""
        return await self._store.find(owner, job_id)

    async def cancel(self, owner: str, job_id: str) -> bool:
        """End it, running or not; False if there is nothing of the owner's to end."""
        if not await self._store.cancel(owner, job_id):
            return False
        job = await self._store.find(owner, job_id)
        if job is not None:
            await remove_references(self._results, job)
        return True

    async def list(
        self,
        owner: str,
        *,
        limit: int,
        before: ListPlace | None = None,
        state: Status | None = None,
    ) -> tuple[Job, ...]:
        """A page of the owner's jobs, newest first, as Store.list."""
        return await self._store.list(owner, limit=limit, before=before, state=state)

    async def position_of(self, job_id: str) -> int | None:
        """How many jobs of its tier are claimed before it; None if it does not wait for that."""
        return await self._store.position_of(job_id)

    async def num_active(self, owner: str) -> int:
        """How many of the owner's jobs have not ended."""
        return await self._store.num_active(owner)

    async def read_by_name(self, name: str) -> bytes:
        """An image of any job, or a preview while it runs. Raises ResultMissing, ResultsLost."""
        return await self._shelf.read(name)

    async def keep(
        self, owner: str, request: ImageRequest, result: ImageResult
    ) -> tuple[StoredImage, ...]:
        """Images that were drawn without a job. Raises ResultsLost and ResultTooLarge."""
        return await self._shelf.keep(owner, request, result)

    async def url_secret(self) -> bytes:
        """What URLs of images are signed with: the same at every gateway of this database."""
        number = self._database.num_renewals
        if number not in self._url_secrets:
            self._url_secrets = {number: await shared_secret(self._database, "result-urls")}
        return self._url_secrets[number]

    async def _begin(self) -> None:
        await self._database.create()
        self._worker.start()
        if self._postman is not None:
            self._postman.start()
        self._tasks.append(spawn(self._results.warn_of_others()))
        self._tasks.append(spawn(keep_clean(self._store, self._results)))
        self._tasks.append(spawn(repeat(self._end_abandoned, PERIOD_S)))

    async def _end_abandoned(self) -> None:
        try:
            await self._abandoned.end_all(self._worker.unread)
        except StoreLost as error:
            logger.warning("jobs that nobody takes stay for now: %s", error)

    async def _begin_later(self) -> None:
        while True:
            await asyncio.sleep(PASS_RETRY_S)
            try:
                return await self._begin()
            except StoreLost as error:
                logger.warning("jobs cannot be taken yet: %s", error)
