"""Simulate one tier: its queue policy, its replicas, and the counts of what became of requests.

`Replicas` keeps those that are starting, up and draining, with what each works on.
`SimulatedTier` calls the queue as the router would, and counts the outcome.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from flux_ray.router.autoscaling.scaler import ScalingState
from flux_ray.router.queue import Assignment, QueuedRequest
from flux_ray.simulator.outcome import Arrival, Curve, ReplicaPool, TierOutcome, Waits


@dataclass(slots=True)
class Replica:
    """A replica that is up; `free_at` is a heap of the times at which its slots will be free."""

    name: str
    free_at: list[float]
    running: dict[str, float] = field(default_factory=dict)
    is_draining: bool = False

    def start(self, ticket_id: str, seconds: float, now: float) -> tuple[float, float]:
        """Run a request as soon as a slot is free; return when it starts and when it ends."""
        begin = max(now, self.free_at[0])
        end = begin + seconds
        heapq.heapreplace(self.free_at, end)
        self.running[ticket_id] = end
        return begin, end


class Replicas:
    """The replicas of a tier by name; counts replica seconds from the order until the end."""

    def __init__(self, tier: str, num_slots: int) -> None:
        self._names = (f"{tier}-{number}" for number in itertools.count())
        self._num_slots = num_slots
        self.up: dict[str, Replica] = {}
        self.draining: dict[str, Replica] = {}
        self.starting: dict[str, float] = {}
        self.held_s = 0.0
        self._counted_until = 0.0

    @property
    def num_held(self) -> int:
        """The number of replicas that hold GPUs."""
        return len(self.up) + len(self.draining) + len(self.starting)

    def pass_time(self, until: float) -> None:
        """Count replica seconds up to `until`."""
        if until > self._counted_until:
            self.held_s += self.num_held * (until - self._counted_until)
            self._counted_until = until

    def order(self, ready_at: float) -> str:
        """Order a replica, and return its name; it is in its cold start until `ready_at`."""
        name = next(self._names)
        self.starting[name] = ready_at
        return name

    def ready(self, name: str) -> bool:
        """Make a replica available after its cold start; return False if it was called off."""
        if self.starting.pop(name, None) is None:
            return False
        self.up[name] = Replica(name, [0.0] * self._num_slots)
        return True

    def call_off(self) -> str | None:
        """Call off the start that would be ready last; return its name, None if there is none."""
        if not self.starting:
            return None
        name = max(self.starting, key=lambda name: (self.starting[name], name))
        del self.starting[name]
        return name

    def drain(self, number: int) -> list[str]:
        """Drain that many replicas, those that will be free first; return their names."""
        chosen = heapq.nsmallest(
            number, self.up.values(), key=lambda replica: (max(replica.free_at), replica.name)
        )
        for replica in chosen:
            del self.up[replica.name]
            if replica.running:
                replica.is_draining = True
                self.draining[replica.name] = replica
        return [replica.name for replica in chosen]

    def lose(self, number: int) -> Replica | None:
        """Remove the replica of that index, modulo how many are up; None if none is."""
        if not self.up:
            return None
        name = list(self.up)[number % len(self.up)]
        return self.up.pop(name)

    def done(self, replica: Replica, ticket_id: str) -> None:
        """Remove a finished request, and a draining replica that has no other."""
        del replica.running[ticket_id]
        if replica.is_draining and not replica.running:
            del self.draining[replica.name]


Schedule = Callable[[float, Callable[[float], None]], None]


@dataclass(slots=True)
class Request:
    """A request that has been admitted and is not done."""

    arrival: Arrival
    queued: QueuedRequest
    is_retry: bool = False
    end_s: float = 0.0


class SimulatedTier:
    """A simulated tier, which calls its queue after every event and when the queue asks for it."""

    def __init__(self, pool: ReplicaPool, schedule: Schedule) -> None:
        self.pool = pool
        self.queue = pool.queue
        self.replicas = Replicas(pool.tier, pool.slots_per_replica)
        self.curve = Curve()
        self.waits = Waits()
        self.num_arrived = self.num_met = self.num_late = self.num_refused = self.num_lost = 0
        self.arrived_s = self.met_s = 0.0
        self.requests: dict[str, Request] = {}
        self.horizon_s = float("inf")
        self._schedule = schedule
        self._wakes: list[float] = []
        self._arrived_since_s = 0.0
        for _ in range(pool.num_replicas):
            self._add(self.replicas.order(0.0), 0.0)

    def arrive(self, arrival: Arrival, now: float) -> None:
        """Submit a request to the queue."""
        self.pass_time(now)
        self.curve.arrive(now, arrival.cost_s)
        self._arrived_since_s += arrival.cost_s
        self.arrived_s += arrival.cost_s
        queued = QueuedRequest(
            f"{self.num_arrived}",
            arrival.tier,
            arrival.cost_s,
            now + arrival.deadline_s,
            arrival.key,
            arrival.weight,
        )
        self.num_arrived += 1
        if self.queue.submit(queued, now) is None:
            self.requests[queued.ticket_id] = Request(arrival, queued)
        else:
            self.num_refused += 1
        # Also after a refusal, for which the queue may have evicted others.
        self.hand_over(now)

    def fail(self, number: int, now: float) -> None:
        """Let a replica die: order another, and submit its requests once more."""
        self.pass_time(now)
        replica = self.replicas.lose(number)
        if replica is None:
            return
        for queued in self.queue.lose_replica(replica.name, now):
            request = self.requests[queued.ticket_id]
            if request.is_retry or self.queue.submit(queued, now) is not None:
                self.num_lost += 1
                del self.requests[queued.ticket_id]
            request.is_retry = True
        self._order(now)
        self.hand_over(now)

    def scale(self, now: float) -> None:
        """Ask the scaling policy, and order or drain replicas as it says."""
        pool, replicas = self.pool, self.replicas
        if pool.scaling is None:
            return
        self.pass_time(now)
        state = ScalingState(
            now,
            len(replicas.up),
            len(replicas.starting),
            self.queue.waiting_s(now),
            self.queue.running_s(now),
            self._arrived_since_s,
            pool.min_replicas,
            pool.max_replicas,
        )
        self._arrived_since_s = 0.0
        wanted = min(max(pool.scaling.replicas(state), pool.min_replicas), pool.max_replicas)
        extra = len(replicas.up) + len(replicas.starting) - wanted
        for _ in range(-extra):
            self._order(now)
        while extra > 0 and (name := replicas.call_off()) is not None:
            self.queue.drain_replica(name, now)
            extra -= 1
        for name in replicas.drain(max(extra, 0)):
            self.queue.drain_replica(name, now)
        self.hand_over(now)

    def hand_over(self, now: float) -> None:
        """Start what the queue assigns, count what it refuses, and note when it is to be woken."""
        assignments, rejected = self.queue.take(now)
        for assignment in assignments:
            self._start(assignment, now)
        for queued, _ in rejected:
            if self.requests.pop(queued.ticket_id).is_retry:
                self.num_lost += 1
            else:
                self.num_refused += 1
        wake_at = self.queue.wake_at()
        if wake_at is not None and (not self._wakes or wake_at < self._wakes[0]):
            heapq.heappush(self._wakes, wake_at)
            self._schedule(max(wake_at, now), self._wake)

    def pass_time(self, now: float) -> None:
        """Bring the curve and the GPU hours up to now, but not beyond the horizon."""
        until = min(now, self.horizon_s)
        if until > self.curve.until_s:
            held = self.replicas
            self.curve.pass_time(
                until, len(held.up), len(held.starting), self.queue.waiting_s(until)
            )
            held.pass_time(until)

    def give_up(self) -> None:
        """Count the requests that still wait as lost, at the end."""
        self.num_lost += len(self.requests)
        self.requests.clear()

    def outcome(self) -> TierOutcome:
        """Return what became of the tier's requests."""
        return TierOutcome(
            self.num_arrived,
            self.num_met,
            self.num_late,
            self.num_refused,
            self.num_lost,
            self.arrived_s,
            self.met_s,
            self.replicas.held_s * self.pool.num_gpus_per_replica / 3600,
            self.waits,
            self.curve.points(),
        )

    def _wake(self, now: float) -> None:
        heapq.heappop(self._wakes)
        self.pass_time(now)
        self.hand_over(now)

    def _start(self, assignment: Assignment, now: float) -> None:
        queued = assignment.request
        name = assignment.replica
        request = self.requests[queued.ticket_id]
        replica = self.replicas.up[name]
        actual_s = request.arrival.actual_s
        begin, end = replica.start(
            queued.ticket_id, queued.cost_s if actual_s is None else actual_s, now
        )
        request.end_s = end
        if not request.is_retry:
            self.waits.add(begin - request.arrival.at_s)
        self._schedule(end, lambda at: self._finish(replica, request, end, at))
        if self.pool.report_period_s is not None:
            self._report(replica, request, begin)

    def _finish(self, replica: Replica, request: Request, end: float, now: float) -> None:
        ticket_id = request.queued.ticket_id
        # The replica died meanwhile, and the request runs elsewhere or is lost.
        if replica.running.get(ticket_id) != end or self._is_dead(replica):
            return
        self.pass_time(now)
        self.replicas.done(replica, ticket_id)
        del self.requests[ticket_id]
        self.queue.finish(ticket_id, now)
        if now <= request.queued.deadline + 1e-9:
            self.num_met += 1
            self.met_s += request.arrival.cost_s
        else:
            self.num_late += 1
        self.hand_over(now)

    def _report(self, replica: Replica, request: Request, now: float) -> None:
        """Report the remaining seconds of a request now, and every period until it is done."""
        ticket_id, end = request.queued.ticket_id, request.end_s
        if replica.running.get(ticket_id) != end or self._is_dead(replica):
            return
        if now > request.arrival.at_s:
            self.queue.progress(ticket_id, end - now, now)
        period_s = self.pool.report_period_s
        if period_s is not None and now + period_s < end:
            self._schedule(now + period_s, lambda at: self._report(replica, request, at))

    def _is_dead(self, replica: Replica) -> bool:
        return replica.name not in self.replicas.up and not replica.is_draining

    def _order(self, now: float) -> None:
        ready_at = now + self.pool.cold_start_s
        name = self.replicas.order(ready_at)
        self.queue.expect_replica(name, ready_at, now)
        self._schedule(ready_at, lambda at: self._ready(name, at))

    def _ready(self, name: str, now: float) -> None:
        self.pass_time(now)
        if name in self.replicas.starting:
            self._add(name, now)
            self.hand_over(now)

    def _add(self, name: str, now: float) -> None:
        self.replicas.ready(name)
        self.queue.add_replica(name, now)
