"""What users compare with: routers that count requests, bind on arrival, or keep a plain queue."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace

from flux_ray.router.queue.entry import Assignment, QueuedRequest, RejectedEntry, Rejection

NO_BOUND = float("inf")


@dataclass(slots=True, eq=False)
class Lane:
    """A replica and the tickets bound to it. `free_at` is by the estimates."""

    name: str
    free_at: float = 0.0
    tickets: dict[str, QueuedRequest] = field(default_factory=dict)

    def wait_s(self, now: float) -> float:
        """What a newcomer would wait."""
        return max(self.free_at - now, 0.0)


# Which of the lanes takes the next ticket, now.
Choice = Callable[[Sequence[Lane], float], Lane]


def round_robin() -> Choice:
    """Each in turn."""
    turn = 0

    def choose(lanes: Sequence[Lane], now: float) -> Lane:
        nonlocal turn
        turn += 1
        return lanes[turn % len(lanes)]

    return choose


def power_of_two(seed: int = 0) -> Choice:
    """Ray Serve's default: of two at random the one with fewer requests."""
    dice = random.Random(seed)

    def choose(lanes: Sequence[Lane], now: float) -> Lane:
        pair = dice.sample(lanes, 2) if len(lanes) > 1 else lanes
        return min(pair, key=lambda lane: len(lane.tickets))

    return choose


def least_requests() -> Choice:
    """The one with the fewest requests; of equals the first."""
    return lambda lanes, now: min(lanes, key=lambda lane: len(lane.tickets))


def least_work() -> Choice:
    """The one that will be free first by the estimates: cost-aware, but bound on arrival."""
    return lambda lanes, now: min(lanes, key=lambda lane: lane.wait_s(now))


class EarlyBinding:
    """Binds every ticket on arrival: it queues at its replica, and never moves.

    Refused is a ticket whose replica has `bound_requests` already, or would let it wait for more
    than `bound_s`. Without any replica, tickets wait for one.
    """

    def __init__(
        self, choose: Choice, *, bound_requests: float = NO_BOUND, bound_s: float = NO_BOUND
    ) -> None:
        self._choose = choose
        self._bound_requests = bound_requests
        self._bound_s = bound_s
        self._lanes: list[Lane] = []
        self._by_ticket: dict[str, Lane] = {}
        self._homeless: deque[QueuedRequest] = deque()
        self._grants: list[Assignment] = []

    def add_replica(self, name: str, now: float) -> None:
        """It is up, and free."""
        self._lanes.append(Lane(name))
        while self._homeless:
            self.submit(self._homeless.popleft(), now)

    def expect_replica(self, name: str, ready_at: float, now: float) -> None:
        """Nothing is made of that."""

    def drain_replica(self, name: str, now: float) -> None:
        """It gets nothing new."""
        self._lanes = [lane for lane in self._lanes if lane.name != name]

    def lose_replica(self, name: str, now: float) -> list[QueuedRequest]:
        """All that is bound to it comes back."""
        self.drain_replica(name, now)
        lost = [
            lane.tickets[ticket_id]
            for ticket_id, lane in self._by_ticket.items()
            if lane.name == name
        ]
        for ticket in lost:
            del self._by_ticket[ticket.ticket_id]
        return lost

    def submit(self, ticket: QueuedRequest, now: float) -> Rejection | None:
        """Bound at once, or refused."""
        if not self._lanes:
            self._homeless.append(ticket)
            return None
        lane = self._choose(self._lanes, now)
        wait_s = lane.wait_s(now)
        if len(lane.tickets) >= self._bound_requests or wait_s > self._bound_s:
            return Rejection("the replica's queue is full", wait_s)
        lane.tickets[ticket.ticket_id] = ticket
        lane.free_at = now + wait_s + ticket.cost_s
        self._by_ticket[ticket.ticket_id] = lane
        self._grants.append(Assignment(ticket, lane.name))
        return None

    def take(self, now: float) -> tuple[list[Assignment], list[RejectedEntry]]:
        """What has been bound since the last time."""
        grants, self._grants = self._grants, []
        return grants, []

    def progress(self, ticket_id: str, remaining_s: float, now: float) -> None:
        """Nothing is made of that."""

    def finish(self, ticket_id: str, now: float) -> None:
        """The estimate of when the replica is free is set right."""
        lane = self._by_ticket.pop(ticket_id)
        del lane.tickets[ticket_id]
        lane.free_at = now + sum(ticket.cost_s for ticket in lane.tickets.values())

    def wake_at(self) -> float | None:
        """Nothing happens by itself."""
        return None

    def waiting_s(self, now: float) -> float:
        """Only what has no replica at all waits here."""
        return sum(ticket.cost_s for ticket in self._homeless)

    def running_s(self, now: float) -> float:
        """All that is bound."""
        lanes = {lane.name: lane for lane in self._by_ticket.values()}
        return sum(lane.wait_s(now) for lane in lanes.values())


class Fifo:
    """One queue for all, first come, first served, and bound only when a replica is free.

    Refused is a ticket that finds `bound_requests` waiting, or would wait for more than `bound_s`
    by the estimates, which are played through. For fleets of tens of replicas.
    """

    def __init__(self, *, bound_requests: float = NO_BOUND, bound_s: float = NO_BOUND) -> None:
        self._bound_requests = bound_requests
        self._bound_s = bound_s
        self._line: deque[QueuedRequest] = deque()
        self._idle: dict[str, None] = {}
        # Ticket, replica, and when it is done by the estimate.
        self._running: dict[str, tuple[QueuedRequest, str, float]] = {}
        self._leaving: set[str] = set()

    def add_replica(self, name: str, now: float) -> None:
        """It is up, and free."""
        self._idle[name] = None

    def expect_replica(self, name: str, ready_at: float, now: float) -> None:
        """Nothing is made of that."""

    def drain_replica(self, name: str, now: float) -> None:
        """It gets nothing new."""
        if name in self._idle:
            del self._idle[name]
        else:
            self._leaving.add(name)

    def lose_replica(self, name: str, now: float) -> list[QueuedRequest]:
        """What it ran comes back."""
        self._idle.pop(name, None)
        lost = [ticket for ticket, replica, _ in self._running.values() if replica == name]
        for ticket in lost:
            del self._running[ticket.ticket_id]
        return lost

    def submit(self, ticket: QueuedRequest, now: float) -> Rejection | None:
        """To the end of the line."""
        has_to_wait = len(self._line) >= len(self._idle)
        if has_to_wait and len(self._line) >= self._bound_requests:
            return Rejection("the queue is full", 0.0)
        if has_to_wait and self._bound_s < NO_BOUND and self._wait_s(now) > self._bound_s:
            return Rejection("the queue is too long", self._wait_s(now) - self._bound_s)
        self._line.append(ticket)
        return None

    def take(self, now: float) -> tuple[list[Assignment], list[RejectedEntry]]:
        """The first in line, one for each replica that is free."""
        grants = []
        while self._line and self._idle:
            ticket, name = self._line.popleft(), next(iter(self._idle))
            del self._idle[name]
            self._running[ticket.ticket_id] = ticket, name, now + ticket.cost_s
            grants.append(Assignment(ticket, name))
        return grants, []

    def progress(self, ticket_id: str, remaining_s: float, now: float) -> None:
        """Nothing is made of that."""

    def finish(self, ticket_id: str, now: float) -> None:
        """Its replica is free."""
        _, name, _ = self._running.pop(ticket_id)
        if name in self._leaving:
            self._leaving.discard(name)
        else:
            self._idle[name] = None

    def wake_at(self) -> float | None:
        """Nothing happens by itself."""
        return None

    def waiting_s(self, now: float) -> float:
        """GPU seconds in line."""
        return sum(ticket.cost_s for ticket in self._line)

    def running_s(self, now: float) -> float:
        """By the estimates."""
        return sum(max(end - now, 0.0) for _, _, end in self._running.values())

    def _wait_s(self, now: float) -> float:
        free = sorted(max(end, now) for _, _, end in self._running.values())
        free = [now] * len(self._idle) + free
        if not free:
            return NO_BOUND
        for ticket in self._line:
            heapreplace(free, free[0] + ticket.cost_s)
        return free[0] - now
