"""A queue that counts its requests: what Serve's autoscaler sees instead of their seconds."""

from flux_ray.router.queue.entry import Assignment, QueuedRequest, RejectedEntry, Rejection
from flux_ray.simulator.outcome import QueuePolicy


class CountedQueue:
    """Another queue, and `num_ongoing`: how many requests wait in it or run on its replicas."""

    def __init__(self, queue: QueuePolicy) -> None:
        self._queue = queue
        self.num_ongoing = 0

    def add_replica(self, name: str, now: float) -> None:
        """It is up, and free."""
        self._queue.add_replica(name, now)

    def expect_replica(self, name: str, ready_at: float, now: float) -> None:
        """It is starting."""
        self._queue.expect_replica(name, ready_at, now)

    def drain_replica(self, name: str, now: float) -> None:
        """It gets nothing new."""
        self._queue.drain_replica(name, now)

    def lose_replica(self, name: str, now: float) -> list[QueuedRequest]:
        """It is gone, and what it had is offered again."""
        lost = self._queue.lose_replica(name, now)
        self.num_ongoing -= len(lost)
        return lost

    def submit(self, ticket: QueuedRequest, now: float) -> Rejection | None:
        """Counted if it is taken in: Serve never hears of what is refused before it."""
        refusal = self._queue.submit(ticket, now)
        self.num_ongoing += refusal is None
        return refusal

    def take(self, now: float) -> tuple[list[Assignment], list[RejectedEntry]]:
        """Whose turn it is, and who has waited in vain."""
        grants, refused = self._queue.take(now)
        self.num_ongoing -= len(refused)
        return grants, refused

    def progress(self, ticket_id: str, remaining_s: float, now: float) -> None:
        """How long a granted ticket will still take."""
        self._queue.progress(ticket_id, remaining_s, now)

    def finish(self, ticket_id: str, now: float) -> None:
        """A granted ticket is done."""
        self._queue.finish(ticket_id, now)
        self.num_ongoing -= 1

    def wake_at(self) -> float | None:
        """When take() should be called."""
        return self._queue.wake_at()

    def waiting_s(self, now: float) -> float:
        """GPU seconds that are not granted yet."""
        return self._queue.waiting_s(now)

    def running_s(self, now: float) -> float:
        """GPU seconds that are granted and not done yet."""
        return self._queue.running_s(now)
