"""The worker of a gateway: claims jobs, so many at once, and has them drawn."""

import socket
import uuid
from collections import Counter

from flux_ray.jobs.attempt import Attempt, Workshop
from flux_ray.jobs.claimer import POLL_S, Claimer, Work
from flux_ray.jobs.job import Lease

# Of the slots: an owner that has so many leaves the rest to others.
MAX_SHARE = 0.75


class Worker(Claimer):
    """Claims one job after another, at most `max_running` at once."""

    def __init__(self, workshop: Workshop, max_running: int, poll_s: float = POLL_S) -> None:
        super().__init__(max_running, poll_s, workshop.pause_s)
        self.name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self._shop = workshop
        self._held: Counter[str] = Counter()

    async def claim(self) -> Work | None:
        """An attempt at the job that has waited longest."""
        most = MAX_SHARE * self._max_running
        busy = tuple(owner for owner, num in self._held.items() if num >= most)
        lease = await self._shop.store.claim(self.name, busy)
        if lease is None:
            return None
        self._held[lease.job.owner] += 1
        return self._attempt(lease)

    async def _attempt(self, lease: Lease) -> None:
        try:
            await Attempt(lease, self._shop).run()
        finally:
            self._held -= Counter({lease.job.owner: 1})
