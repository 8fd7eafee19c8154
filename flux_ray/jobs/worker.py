"""The worker of a gateway: claims jobs, so many at once, and has them drawn."""

import socket
import uuid
from collections.abc import Collection

from flux_ray.jobs.attempt import Attempt, Workshop
from flux_ray.jobs.claimer import POLL_S, Claim, Claimer

# Of the slots: an owner that has so many leaves the rest to others.
MAX_SHARE = 0.75


class Worker(Claimer):
    """Claims one job after another, at most `max_running` at once."""

    def __init__(self, workshop: Workshop, max_running: int, poll_s: float = POLL_S) -> None:
        super().__init__(max_running, MAX_SHARE * max_running, poll_s, workshop.pause_s)
        self.name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self._shop = workshop

    async def claim(self, but_of: Collection[str]) -> Claim | None:
        """An attempt at the job that has waited longest."""
        lease = await self._shop.store.claim(self.name, but_of)
        if lease is None:
            return None
        return Claim(lease.job.owner, Attempt(lease, self._shop).run())
