"""The replicas of a tier as the queue sees them: which are free, and when the others will be.

Each replica has one or more slots, and each slot runs one request at a time (`Slots`).
`CacheDirectory` guesses which replicas still have an encoded prompt or reference in their cache.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.router.queue.sums import SortedSums

MAX_NAMES = 50_000
MAX_HOLDERS = 16


class CacheDirectory:
    """A guess, from past assignments, at which replica has cached what.

    Replicas do not report their caches. The least recently assigned names are forgotten first.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()

    def note(self, request: QueuedRequest, replica: str) -> None:
        """Note that the replica was assigned this request, and so will have its encodings."""
        for name, _ in request.affinity:
            holders = self._holders.setdefault(name, OrderedDict())
            self._holders.move_to_end(name)
            holders[replica] = None
            holders.move_to_end(replica)
            if len(holders) > MAX_HOLDERS:
                holders.popitem(last=False)
        while len(self._holders) > MAX_NAMES:
            self._holders.popitem(last=False)

    def savings(self, request: QueuedRequest) -> dict[str, float]:
        """Return the seconds that each replica would save with this request, by replica."""
        saved_s: dict[str, float] = {}
        for name, seconds in request.affinity:
            for replica in self._holders.get(name, ()):
                saved_s[replica] = saved_s.get(replica, 0.0) + seconds
        return saved_s


free_at_of = attrgetter("free_at")
# The name of a hoped-for first replica, while none is up and none is known to be starting.
HOPED_FOR = ""


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one request on a replica, and for a second while the first is about to end.

    `begun_at` is when its first request started, `free_at` when all of them will be done. `entry`
    is the number of its newest entry in the heap of idle slots; older entries are stale.
    """

    replica: str
    number: int
    free_at: float = 0.0
    begun_at: float = 0.0
    requests: list[QueuedRequest] = field(default_factory=list)
    is_expected: bool = False
    is_leaving: bool = False
    entry: int = -1


class Slots:
    """All slots of a tier. A slot that is overdue has zero seconds left, never fewer."""

    def __init__(self, num_per_replica: int = 1, lead_s: float = 0.0) -> None:
        self.num_per_replica = num_per_replica
        self.lead_s = lead_s
        self.num_idle = 0
        # By the time at which they will be free; slots of starting replicas are among them.
        self.busy: SortedSums[Slot] = SortedSums()
        self._numbers = itertools.count()
        self._entries = itertools.count()
        self._replicas: dict[str, list[Slot]] = {}
        self._leaving: dict[str, list[Slot]] = {}
        self._expected: dict[str, list[Slot]] = {}
        self._by_ticket: dict[str, Slot] = {}
        self._idle: list[tuple[int, float, int, Slot]] = []

    @property
    def names(self) -> frozenset[str]:
        """The replicas that are up or starting, without those that drain."""
        return frozenset(self._replicas.keys() - {HOPED_FOR})

    @property
    def has_any(self) -> bool:
        """Whether a replica is up or starting; `names` would copy thousands to tell."""
        return len(self._replicas) > self.is_hoping

    @property
    def num(self) -> int:
        """The number of slots that take requests, now or once they have started."""
        return len(self._replicas) * self.num_per_replica

    @property
    def is_hoping(self) -> bool:
        """Whether a first replica is hoped for, that is, counted on without being known."""
        return HOPED_FOR in self._replicas

    @property
    def hoped_for_at(self) -> float:
        """When the hoped-for replica should be up."""
        return self._replicas[HOPED_FOR][0].free_at

    def hope(self, ready_at: float | None) -> None:
        """Count on a first replica from that time on; with None, stop counting on one."""
        self._pop(HOPED_FOR)
        if ready_at is not None:
            self.expect(HOPED_FOR, ready_at)

    def holds(self, ticket_id: str) -> bool:
        """Return whether the request was assigned and is not done."""
        return ticket_id in self._by_ticket

    def replica_of(self, ticket_id: str) -> str | None:
        """Return the replica on which the request is, None if it is on none."""
        slot = self._by_ticket.get(ticket_id)
        return None if slot is None else slot.replica

    def expect(self, name: str, ready_at: float) -> None:
        """Count on a starting replica from `ready_at` on, without assigning it anything yet."""
        if name in self._replicas:
            return
        self._pop(HOPED_FOR)
        self._replicas[name] = self._expected[name] = self._new(name)
        for slot in self._replicas[name]:
            slot.is_expected = True
            self._enter_busy(slot, ready_at)

    def add(self, name: str) -> None:
        """Make a replica available; do nothing if it is known to be up already.

        One that was draining comes back with the requests that it still runs.
        """
        expected = self._expected.pop(name, [])
        if name in self._replicas and not expected:
            return
        for slot in expected:
            self._leave_busy(slot)
        self._pop(HOPED_FOR)
        self._replicas[name] = slots = self._leaving.pop(name, None) or self._new(name)
        for slot in slots:
            slot.is_leaving = False
            if slot.requests:
                self._enter_busy(slot, slot.free_at)
        for slot in slots:
            if not slot.requests:
                self._enter_idle(slot)

    def drain(self, name: str) -> None:
        """Assign the replica nothing more; what it runs goes on."""
        slots = self._pop(name)
        if any(slot.requests for slot in slots):
            self._leaving[name] = slots

    def lose(self, name: str) -> list[QueuedRequest]:
        """Remove a dead replica, and return the requests that it had not finished."""
        slots = [*self._leaving.pop(name, ()), *self._pop(name)]
        lost = [request for slot in slots for request in slot.requests]
        for request in lost:
            del self._by_ticket[request.ticket_id]
        return lost

    def can_take(self, now: float) -> bool:
        """Return whether a request could be assigned now."""
        return self.num_idle > 0 or self._nearly_free(now) is not None

    def choose(self, preferred: Iterable[tuple[str, float]], now: float) -> Slot:
        """Return a slot of the replica with the least outstanding seconds, less what it saves.

        `preferred` has replicas with the seconds that their caches would save. Raise RuntimeError
        if no slot can take a request.
        """
        best = self._most_idle() or self._nearly_free(now)
        if best is None:
            raise RuntimeError("no slot is free")
        best_s = self.outstanding_s(best.replica, now)
        for name, saved_s in preferred:
            # The cache directory also remembers replicas that are gone.
            free = [slot for slot in self._replicas.get(name, ()) if self._takes(slot, now)]
            if not free:
                continue
            worth_s = self.outstanding_s(name, now) - saved_s
            if worth_s < best_s:
                best, best_s = min(free, key=free_at_of), worth_s
        return best

    def adopt(self, name: str, request: QueuedRequest, now: float) -> None:
        """Note that a replica runs this request already, whether or not it is known to be up.

        A new ledger hears of running requests from gateways, often before it knows the replicas.
        """
        if name in self._replicas and name not in self._expected:
            slots = self._replicas[name]
            self.start(min(slots, key=lambda slot: len(slot.requests)), request, now)
            return
        slots = self._leaving.setdefault(name, self._new(name))
        slot = min(slots, key=lambda slot: len(slot.requests))
        slot.is_leaving = True
        if not slot.requests:
            slot.begun_at = slot.free_at = now
        slot.free_at = max(now, slot.free_at) + request.cost_s
        slot.requests.append(request)
        self._by_ticket[request.ticket_id] = slot

    def start(self, slot: Slot, request: QueuedRequest, now: float) -> None:
        """Assign the request to this slot."""
        begin = now
        if not slot.requests:
            self._leave_idle(slot)
            slot.begun_at = now
        else:
            begin = max(now, slot.free_at)
            self._leave_busy(slot)
        slot.requests.append(request)
        self._by_ticket[request.ticket_id] = slot
        self._enter_busy(slot, begin + request.cost_s)
        self._refresh(slot.replica)

    def progress(self, ticket_id: str, remaining_s: float, now: float) -> None:
        """Correct how long an assigned request still takes, as its replica reports."""
        slot = self._by_ticket.get(ticket_id)
        if slot is None:
            return
        place = [request.ticket_id for request in slot.requests].index(ticket_id)
        free_at = now + remaining_s + sum(request.cost_s for request in slot.requests[place + 1 :])
        if slot.is_leaving:
            slot.free_at = free_at
            return
        self._leave_busy(slot)
        self._enter_busy(slot, free_at)

    def taken_s(self, ticket_id: str, now: float) -> tuple[float, float] | None:
        """Return the seconds since a request started, and its price; None if it has not started."""
        slot = self._by_ticket.get(ticket_id)
        if slot is None or slot.requests[0].ticket_id != ticket_id:
            return None
        return now - slot.begun_at, slot.requests[0].cost_s

    def still_runs(self, ticket_id: str, since: float, now: float) -> bool:
        """Return whether a request that had begun by `since` takes longer, as far as is known."""
        slot = self._by_ticket.get(ticket_id)
        if slot is None or slot.requests[0].ticket_id != ticket_id or slot.begun_at > since:
            return False
        return slot.free_at - sum(request.cost_s for request in slot.requests[1:]) > now

    def finish(self, ticket_id: str, now: float) -> None:
        """Remove a request that is done or cancelled; ignore an unknown one."""
        slot = self._by_ticket.pop(ticket_id, None)
        if slot is None:
            return
        place = [request.ticket_id for request in slot.requests].index(ticket_id)
        leaver = slot.requests.pop(place)
        free_at = slot.free_at - leaver.cost_s
        if place == 0:
            slot.begun_at = now
            free_at = now + sum(request.cost_s for request in slot.requests)
        if slot.is_leaving:
            slot.free_at = free_at
            if not any(other.requests for other in self._leaving[slot.replica]):
                del self._leaving[slot.replica]
            return
        self._leave_busy(slot)
        if slot.requests:
            self._enter_busy(slot, free_at)
        else:
            self._enter_idle(slot)
        self._refresh(slot.replica)

    def outstanding_s(self, name: str, now: float) -> float:
        """Return the seconds of work that one replica still has."""
        return sum(max(slot.free_at - now, 0.0) for slot in self._replicas[name] if slot.requests)

    def running_s(self, now: float) -> float:
        """Return the seconds of work that all replicas still have, draining ones included."""
        overdue, overdue_sum = self.busy.before((now, -1))
        running_s = self.busy.total - overdue_sum - now * (len(self.busy) - overdue)
        for slot in self._not_running():
            running_s -= max(slot.free_at - now, 0.0)
        for slots in self._leaving.values():
            running_s += sum(max(slot.free_at - now, 0.0) for slot in slots if slot.requests)
        return max(running_s, 0.0) if self._by_ticket else 0.0

    def next_at(self) -> float | None:
        """Return when a busy slot will next be within `lead_s` of being free; None without lead."""
        if self.lead_s <= 0:
            return None
        for slot in self.busy:
            if not slot.is_expected and len(slot.requests) < 2:
                return slot.free_at - self.lead_s
        return None

    def _not_running(self) -> list[Slot]:
        return [slot for slots in self._expected.values() for slot in slots]

    def _new(self, name: str) -> list[Slot]:
        return [Slot(name, next(self._numbers)) for _ in range(self.num_per_replica)]

    def _takes(self, slot: Slot, now: float) -> bool:
        if slot.is_expected:
            return False
        return not slot.requests or (len(slot.requests) < 2 and slot.free_at - self.lead_s <= now)

    def _nearly_free(self, now: float) -> Slot | None:
        if self.lead_s > 0:
            for slot in self.busy:
                # The same expression as in next_at(), to the bit: or the queue could be woken
                # at that time again and again without finding the slot free.
                if slot.free_at - self.lead_s > now:
                    break
                if self._takes(slot, now):
                    return slot
        return None

    def _pop(self, name: str) -> list[Slot]:
        self._expected.pop(name, None)
        slots = self._replicas.pop(name, [])
        for slot in slots:
            if slot.requests or slot.is_expected:
                self._leave_busy(slot)
            else:
                self._leave_idle(slot)
            slot.is_leaving = True
        return slots

    def _enter_busy(self, slot: Slot, free_at: float) -> None:
        slot.free_at = free_at
        self.busy.add((free_at, slot.number), free_at, slot)

    def _leave_busy(self, slot: Slot) -> None:
        self.busy.remove((slot.free_at, slot.number))

    def _enter_idle(self, slot: Slot) -> None:
        self.num_idle += 1
        self._rank(slot)

    def _leave_idle(self, slot: Slot) -> None:
        self.num_idle -= 1
        slot.entry = -1

    def _refresh(self, name: str) -> None:
        """Rank the idle slots of a replica anew after its load has changed."""
        if self.num_per_replica > 1:
            for slot in self._replicas[name]:
                if slot.entry >= 0:
                    self._rank(slot)

    def _rank(self, slot: Slot) -> None:
        loads = [other.free_at for other in self._replicas[slot.replica] if other.requests]
        slot.entry = next(self._entries)
        heapq.heappush(self._idle, (len(loads), sum(loads), slot.entry, slot))
        if len(self._idle) > 2 * self.num_idle + 64:
            self._idle = [entry for entry in self._idle if entry[3].entry == entry[2]]
            heapq.heapify(self._idle)

    def _most_idle(self) -> Slot | None:
        while self._idle and self._idle[0][3].entry != self._idle[0][2]:
            heapq.heappop(self._idle)
        return self._idle[0][3] if self._idle else None
