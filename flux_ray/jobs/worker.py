"""The worker of a gateway: claims jobs, so many of each tier at once, and has them drawn."""

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

# Of the slots of a tier: an owner that has so many leaves the rest to others.
MAX_SHARE = 0.75
# Of jobs that it could not read; it would try a forgotten one once more.
MAX_UNREAD = 1000


class Worker(LeaseWorker):
    """Claims one job after another, at most `max_running` of a tier at once.

    `tiers`: of no others, which another gateway may serve; None: of all.
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
        self._shop = workshop
        self._tiers = None if tiers is None else frozenset(tiers)
        # In the order in which they came.
        self._unread: dict[str, None] = {}
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to claim, and to watch for jobs whose workers are lost."""
        super().start()
        if self._watching is None and not self._is_stopping:
            self._watching = spawn(repeat(self._watch, self._shop.store.watch_period_s))

    def stop_claiming(self) -> None:
        """Claim no more; what runs goes on, and what waits for a replica is given back."""
        super().stop_claiming()
        if self._watching is not None:
            self._watching.cancel()

    @property
    def unread(self) -> frozenset[str]:
        """Return the ids of jobs that it could not read."""
        return frozenset(self._unread)

    async def claim(self, busy: Busy) -> LeasedJob | None:
        """An attempt at the job that has waited longest."""
        if self._tiers is not None and self._tiers <= busy.pools:
            return None
        wanted = Wanted(self._tiers, busy.pools, busy.owners, self.unread)
        lease = await self._shop.store.claim(self.name, wanted)
        if lease is None:
            return None
        return LeasedJob(lease.job.owner, self._work_on(lease), lease.job.tier)

    def _work_on(self, lease: Lease) -> Coroutine[None, None, None]:
        """Return what is to be done with it.

        Whether it can be read is seen here and not by that: the next claim, which may come before
        that begins, must not claim it again.
        """
        try:
            check_readable(lease.job.packed)
        except Unreadable as error:
            logger.warning("job %s is left to others: %s", lease.job_id, error)
            self._unread[lease.job_id] = None
            if len(self._unread) > MAX_UNREAD:
                self._unread.pop(next(iter(self._unread)))
            return self._leave(lease)
        return Attempt(lease, self._shop, lambda: self._is_stopping).run()

    async def _leave(self, lease: Lease) -> None:
        """Give it back, uncounted, to a worker that can read it."""
        while True:
            try:
                await self._shop.store.give_back(lease)
                return
            except StoreLost:
                await asyncio.sleep(self._shop.pause_s)

    async def _watch(self) -> None:
        try:
            if await self._shop.store.watch():
                self.wake()
        except StoreLost:
            # Whoever claims tells of it.
            return
