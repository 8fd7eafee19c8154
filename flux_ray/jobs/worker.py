"""The worker of a gateway, which claims jobs and runs an attempt at each."""

import asyncio
import logging
import socket
import uuid
from collections.abc import Collection, Coroutine

from flux_ray.errors import StoreLost
from flux_ray.jobs.attempt import Attempt, WorkerContext
from flux_ray.jobs.job import Lease
from flux_ray.jobs.lease_worker import POLL_S, Busy, LeasedJob, LeaseWorker, repeat, spawn
from flux_ray.jobs.serialization import Unreadable, check_readable
from flux_ray.jobs.statements import Wanted

logger = logging.getLogger("ray.serve")

# The share of a tier's slots that one owner's jobs may take at this gateway.
MAX_SHARE = 0.75
# Ids of unreadable jobs that are remembered; a forgotten one is claimed and given back once more.
MAX_UNREAD = 1000


class Worker(LeaseWorker):
    """The loop that claims jobs of `tiers` (None: of all), and runs up to `max_running` of each.

    Jobs of other tiers are left to the gateways that serve them. It also watches for running jobs
    whose workers are lost, at this gateway or another, and claims those.
    """

    def __init__(
        self,
        workshop: WorkerContext,
        max_running: int,
        poll_s: float = POLL_S,
        tiers: Collection[str] | None = None,
    ) -> None:
        super().__init__(max_running, MAX_SHARE * max_running, poll_s, workshop.pause_s)
        self.name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self._context = workshop
        self._tiers = None if tiers is None else frozenset(tiers)
        # Used as an ordered set: the oldest id is forgotten first.
        self._unread: dict[str, None] = {}
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start claiming, and watching for jobs whose workers are lost."""
        super().start()
        if self._watching is None and not self._is_stopping:
            self._watching = spawn(repeat(self._watch, self._context.store.watch_period_s))

    def stop_claiming(self) -> None:
        """Stop claiming; running jobs go on, and those that wait for a replica are given back."""
        super().stop_claiming()
        if self._watching is not None:
            self._watching.cancel()

    @property
    def unread(self) -> frozenset[str]:
        """Return the ids of jobs that this release could not read."""
        return frozenset(self._unread)

    async def claim(self, busy: Busy) -> LeasedJob | None:
        """Claim the job that has waited longest, with an attempt at it as the work."""
        if self._tiers is not None and self._tiers <= busy.pools:
            return None
        wanted = Wanted(self._tiers, busy.pools, busy.owners, self.unread)
        lease = await self._context.store.claim(self.name, wanted)
        if lease is None:
            return None
        return LeasedJob(lease.job.owner, self._work_on(lease), lease.job.tier)

    def _work_on(self, lease: Lease) -> Coroutine[None, None, None]:
        """Return the work for a claimed job: an attempt, or to give it back if it is unreadable.

        The row is checked here and not in that work: the next claim may come before the work
        starts, and must know already not to claim this job again.
        """
        try:
            check_readable(lease.job.packed)
        except Unreadable as error:
            logger.warning("job %s is left to others: %s", lease.job_id, error)
            self._unread[lease.job_id] = None
            if len(self._unread) > MAX_UNREAD:
                self._unread.pop(next(iter(self._unread)))
            return self._leave(lease)
        return Attempt(lease, self._context, lambda: self._is_stopping).run()

    async def _leave(self, lease: Lease) -> None:
        """Give the job back, not counted as lost, to a gateway that can read it."""
        while True:
            try:
                await self._context.store.give_back(lease)
                return
            except StoreLost:
                await asyncio.sleep(self._context.pause_s)

    async def _watch(self) -> None:
        try:
            if await self._context.store.watch():
                self.wake()
        except StoreLost:
            # The claiming loop logs the same error.
            return
