"""A cluster that obeys a queue to the letter, and complains of every impossible order."""

import math

from flux_ray.router.queue.entry import QueuedRequest, Rejection
from flux_ray.router.queue.tier_queue import TierQueue


class Cluster:
    """Replicas with one slot and room for one ticket more; everything takes what it costs."""

    def __init__(
        self, queue: TierQueue, replicas: tuple[str, ...] = (), num_slots: int = 1
    ) -> None:
        self.queue = queue
        self.now = 0.0
        self.num_slots = num_slots
        self.replicas: set[str] = set()
        self.running: dict[str, tuple[QueuedRequest, str, float]] = {}
        self.waiting: dict[str, QueuedRequest] = {}
        self.granted: list[str] = []
        self.refused: list[str] = []
        for name in replicas:
            self.add(name)

    def add(self, name: str) -> None:
        self.replicas.add(name)
        self.queue.add_replica(name, self.now)

    def lose(self, name: str) -> list[QueuedRequest]:
        self.replicas.discard(name)
        lost = self.queue.lose_replica(name, self.now)
        mine = {ticket.ticket_id for ticket, replica, _ in self.running.values() if replica == name}
        assert {ticket.ticket_id for ticket in lost} == mine
        for ticket in lost:
            del self.running[ticket.ticket_id]
            self.granted.remove(ticket.ticket_id)
        return lost

    def submit(self, ticket: QueuedRequest) -> Rejection | None:
        refusal = self.queue.submit(ticket, self.now)
        if refusal is None:
            self.waiting[ticket.ticket_id] = ticket
        else:
            self.refused.append(ticket.ticket_id)
        self.take()
        return refusal

    def take(self) -> None:
        grants, refused = self.queue.take(self.now)
        for ticket, replica in grants:
            assert self.waiting.pop(ticket.ticket_id) == ticket
            assert replica in self.replicas
            assert ticket.ticket_id not in self.granted
            ends = sorted(end for _, name, end in self.running.values() if name == replica)
            room = self.num_slots if self.queue.lead_s == 0 else 2 * self.num_slots
            assert len(ends) < room
            begin = self.now if len(ends) < self.num_slots else max(self.now, ends[0])
            self.running[ticket.ticket_id] = ticket, replica, begin + ticket.cost_s
            self.granted.append(ticket.ticket_id)
        for ticket, _ in refused:
            assert self.waiting.pop(ticket.ticket_id) == ticket
            self.refused.append(ticket.ticket_id)

    def finish(self, ticket_id: str) -> None:
        del self.running[ticket_id]
        self.queue.finish(ticket_id, self.now)
        self.take()

    def run_until(self, until: float) -> None:
        """Whatever ends until then ends, one after the other."""
        while True:
            ending = (
                min((end, name) for name, (_, _, end) in self.running.items())
                if (self.running)
                else (math.inf, "")
            )
            wake_at = self.queue.wake_at()
            at = min(ending[0], math.inf if wake_at is None else max(wake_at, self.now))
            if at > until:
                break
            self.now = at
            if ending[0] <= at:
                self.finish(ending[1])
            else:
                self.take()
        self.now = max(self.now, until)
