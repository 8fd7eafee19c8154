"""The replicas of a tier as the queue sees them: which are free, and when the others will be.

Which replicas were lately given a prompt or a reference, and so hold what was made of it.
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
    """A guess from the grants; the least recently granted names are forgotten."""

    def __init__(self) -> None:
        self._holders: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()

    def note(self, ticket: QueuedRequest, replica: str) -> None:
        """The ticket went there."""
        for name, _ in ticket.affinity:
            holders = self._holders.setdefault(name, OrderedDict())
            self._holders.move_to_end(name)
            holders[replica] = None
            holders.move_to_end(replica)
            if len(holders) > MAX_HOLDERS:
                holders.popitem(last=False)
        while len(self._holders) > MAX_NAMES:
            self._holders.popitem(last=False)

    def savings(self, ticket: QueuedRequest) -> dict[str, float]:
        """Seconds saved, by replica."""
        saved_s: dict[str, float] = {}
        for name, seconds in ticket.affinity:
            for replica in self._holders.get(name, ()):
                saved_s[replica] = saved_s.get(replica, 0.0) + seconds
        return saved_s


free_at_of = attrgetter("free_at")
# Stands for a first replica, where none is up and none is known to be starting.
HOPED_FOR = ""


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one ticket on a replica, and for one more while that is about to end.

    `begun_at`: when its first ticket started; `free_at`: when it has done all of them. `entry` is
    its newest entry among the idle.
    """

    replica: str
    number: int
    free_at: float = 0.0
    begun_at: float = 0.0
    tickets: list[QueuedRequest] = field(default_factory=list)
    is_expected: bool = False
    is_leaving: bool = False
    entry: int = -1


class Slots:
    """All slots of the tier. Seconds already run over an estimate count as zero, not less."""

    def __init__(self, num_per_replica: int = 1, lead_s: float = 0.0) -> None:
        self.num_per_replica = num_per_replica
        self.lead_s = lead_s
        self.num_idle = 0
        # By the time at which they will be free; expected ones are among them.
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
        """Replicas that are up or expected, not those that drain."""
        return frozenset(self._replicas.keys() - {HOPED_FOR})

    @property
    def has_any(self) -> bool:
        """Whether a replica is up or expected, without a look at each of thousands."""
        return len(self._replicas) > self.is_hoping

    @property
    def num(self) -> int:
        """Slots that take tickets now or soon."""
        return len(self._replicas) * self.num_per_replica

    @property
    def is_hoping(self) -> bool:
        """Whether a first replica is counted on."""
        return HOPED_FOR in self._replicas

    @property
    def hoped_for_at(self) -> float:
        """When that should be up."""
        return self._replicas[HOPED_FOR][0].free_at

    def hope(self, ready_at: float | None) -> None:
        """Count on a first replica from that time on; None: on none."""
        self._pop(HOPED_FOR)
        if ready_at is not None:
            self.expect(HOPED_FOR, ready_at)

    def holds(self, ticket_id: str) -> bool:
        """Whether it was granted and is not done."""
        return ticket_id in self._by_ticket

    def replica_of(self, ticket_id: str) -> str | None:
        """The replica that a ticket was granted and is not done on."""
        slot = self._by_ticket.get(ticket_id)
        return None if slot is None else slot.replica

    def expect(self, name: str, ready_at: float) -> None:
        """A replica is starting."""
        if name in self._replicas:
            return
        self._pop(HOPED_FOR)
        self._replicas[name] = self._expected[name] = self._new(name)
        for slot in self._replicas[name]:
            slot.is_expected = True
            self._enter_busy(slot, ready_at)

    def add(self, name: str) -> None:
        """A replica is up; one that is known to be up already stays as it is.

        One that was thought to be gone comes back with what it runs.
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
            if slot.tickets:
                self._enter_busy(slot, slot.free_at)
        for slot in slots:
            if not slot.tickets:
                self._enter_idle(slot)

    def drain(self, name: str) -> None:
        """Nothing new for it; what it runs goes on."""
        slots = self._pop(name)
        if any(slot.tickets for slot in slots):
            self._leaving[name] = slots

    def lose(self, name: str) -> list[QueuedRequest]:
        """It is gone; what it had been given and has not done."""
        slots = [*self._leaving.pop(name, ()), *self._pop(name)]
        lost = [ticket for slot in slots for ticket in slot.tickets]
        for ticket in lost:
            del self._by_ticket[ticket.ticket_id]
        return lost

    def can_take(self, now: float) -> bool:
        """Whether a ticket could be granted now."""
        return self.num_idle > 0 or self._nearly_free(now) is not None

    def choose(self, preferred: Iterable[tuple[str, float]], now: float) -> Slot:
        """The slot of the replica with the least outstanding seconds, less what a cache saves.

        `preferred`: replicas, with the seconds that what they hold would save. RuntimeError if no
        slot can take a ticket.
        """
        best = self._most_idle() or self._nearly_free(now)
        if best is None:
            raise RuntimeError("no slot is free")
        best_s = self.outstanding_s(best.replica, now)
        for name, saved_s in preferred:
            # Those that are gone are remembered too.
            free = [slot for slot in self._replicas.get(name, ()) if self._takes(slot, now)]
            if not free:
                continue
            worth_s = self.outstanding_s(name, now) - saved_s
            if worth_s < best_s:
                best, best_s = min(free, key=free_at_of), worth_s
        return best

    def adopt(self, name: str, ticket: QueuedRequest, now: float) -> None:
        """The replica runs this ticket already; if it is not known to be up, it may come to be."""
        if name in self._replicas and name not in self._expected:
            slots = self._replicas[name]
            self.start(min(slots, key=lambda slot: len(slot.tickets)), ticket, now)
            return
        slots = self._leaving.setdefault(name, self._new(name))
        slot = min(slots, key=lambda slot: len(slot.tickets))
        slot.is_leaving = True
        if not slot.tickets:
            slot.begun_at = slot.free_at = now
        slot.free_at = max(now, slot.free_at) + ticket.cost_s
        slot.tickets.append(ticket)
        self._by_ticket[ticket.ticket_id] = slot

    def start(self, slot: Slot, ticket: QueuedRequest, now: float) -> None:
        """The ticket is granted to this slot."""
        begin = now
        if not slot.tickets:
            self._leave_idle(slot)
            slot.begun_at = now
        else:
            begin = max(now, slot.free_at)
            self._leave_busy(slot)
        slot.tickets.append(ticket)
        self._by_ticket[ticket.ticket_id] = slot
        self._enter_busy(slot, begin + ticket.cost_s)
        self._refresh(slot.replica)

    def progress(self, ticket_id: str, remaining_s: float, now: float) -> None:
        """What a granted ticket still takes, by its replica."""
        slot = self._by_ticket.get(ticket_id)
        if slot is None:
            return
        place = [ticket.ticket_id for ticket in slot.tickets].index(ticket_id)
        free_at = now + remaining_s + sum(ticket.cost_s for ticket in slot.tickets[place + 1 :])
        if slot.is_leaving:
            slot.free_at = free_at
            return
        self._leave_busy(slot)
        self._enter_busy(slot, free_at)

    def taken_s(self, ticket_id: str, now: float) -> tuple[float, float] | None:
        """Seconds since a granted ticket started, and those it was to take; None if it did not."""
        slot = self._by_ticket.get(ticket_id)
        if slot is None or slot.tickets[0].ticket_id != ticket_id:
            return None
        return now - slot.begun_at, slot.tickets[0].cost_s

    def finish(self, ticket_id: str, now: float) -> None:
        """It is done, or was cancelled; unknown ones are ignored."""
        slot = self._by_ticket.pop(ticket_id, None)
        if slot is None:
            return
        if slot.tickets[0].ticket_id == ticket_id:
            slot.begun_at = now
        slot.tickets = [ticket for ticket in slot.tickets if ticket.ticket_id != ticket_id]
        free_at = now + sum(ticket.cost_s for ticket in slot.tickets)
        if slot.is_leaving:
            slot.free_at = free_at
            if not any(other.tickets for other in self._leaving[slot.replica]):
                del self._leaving[slot.replica]
            return
        self._leave_busy(slot)
        if slot.tickets:
            self._enter_busy(slot, free_at)
        else:
            self._enter_idle(slot)
        self._refresh(slot.replica)

    def outstanding_s(self, name: str, now: float) -> float:
        """Of one replica."""
        return sum(max(slot.free_at - now, 0.0) for slot in self._replicas[name] if slot.tickets)

    def running_s(self, now: float) -> float:
        """Of all of them, those that drain included."""
        overdue, overdue_sum = self.busy.before((now, -1))
        running_s = self.busy.total - overdue_sum - now * (len(self.busy) - overdue)
        for slot in self._not_running():
            running_s -= max(slot.free_at - now, 0.0)
        for slots in self._leaving.values():
            running_s += sum(max(slot.free_at - now, 0.0) for slot in slots if slot.tickets)
        return max(running_s, 0.0) if self._by_ticket else 0.0

    def next_at(self) -> float | None:
        """When the next slot is so nearly free that it takes a ticket, if that is an estimate."""
        if self.lead_s <= 0:
            return None
        for slot in self.busy:
            if not slot.is_expected and len(slot.tickets) < 2:
                return slot.free_at - self.lead_s
        return None

    def _not_running(self) -> list[Slot]:
        return [slot for slots in self._expected.values() for slot in slots]

    def _new(self, name: str) -> list[Slot]:
        return [Slot(name, next(self._numbers)) for _ in range(self.num_per_replica)]

    def _takes(self, slot: Slot, now: float) -> bool:
        if slot.is_expected:
            return False
        return not slot.tickets or (len(slot.tickets) < 2 and slot.free_at - self.lead_s <= now)

    def _nearly_free(self, now: float) -> Slot | None:
        if self.lead_s > 0:
            for slot in self.busy:
                # As next_at() has it: to the bit, or it would be called again and again.
                if slot.free_at - self.lead_s > now:
                    break
                if self._takes(slot, now):
                    return slot
        return None

    def _pop(self, name: str) -> list[Slot]:
        self._expected.pop(name, None)
        slots = self._replicas.pop(name, [])
        for slot in slots:
            if slot.tickets or slot.is_expected:
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
        """Its load has changed: its idle slots are ranked anew."""
        if self.num_per_replica > 1:
            for slot in self._replicas[name]:
                if slot.entry >= 0:
                    self._rank(slot)

    def _rank(self, slot: Slot) -> None:
        loads = [other.free_at for other in self._replicas[slot.replica] if other.tickets]
        slot.entry = next(self._entries)
        heapq.heappush(self._idle, (len(loads), sum(loads), slot.entry, slot))
        if len(self._idle) > 2 * self.num_idle + 64:
            self._idle = [entry for entry in self._idle if entry[3].entry == entry[2]]
            heapq.heapify(self._idle)

    def _most_idle(self) -> Slot | None:
        while self._idle and self._idle[0][3].entry != self._idle[0][2]:
            heapq.heappop(self._idle)
        return self._idle[0][3] if self._idle else None
