"""The queue of a tier, one for the whole cluster: who is taken in, whose turn it is, and where."""

import heapq
from collections.abc import Iterable
from itertools import count

from flux_ray.request import QueuePosition
from flux_ray.router.queue.admission import (
    MAX_PLAYED,
    NEVER,
    SAME_S,
    EstimateError,
    Forecast,
    Line,
    QueueEntry,
    capacity_curve,
    choose_evictions,
    free_times,
    level,
    play,
    wait_of,
)
from flux_ray.router.queue.entry import Assignment, QueuedRequest, RejectedEntry, Rejection
from flux_ray.router.queue.shares import Shares
from flux_ray.router.queue.slots import CacheDirectory, Slot, Slots
from flux_ray.router.queue.sums import SortedSums

# A start that takes longer than it should: so much of the usual time is still to be counted on.
OVERDUE_SHARE = 0.25


class TierQueue:
    """Tickets wait in order of the time by which they should start, and are bound late.

    A plain object: every method is told the time, and none waits. Call take() after anything else,
    and at wake_at().

    Who said a deadline should start by its latest start; who said none waits in order of arrival.
    Keys that ask for more than their share of the GPU seconds wait behind all others (shares.py),
    and of both the jobs behind the people. What is behind gives way to what is in front.

    A ticket is taken in if it will start by its latest start. Where it would be late, or make
    another late, the longest waiting ticket without which all are in time gives way, or the
    newcomer if none is longer (admission.py). Nobody is refused who could be served in time, and
    whoever cannot be is told so by their latest start, wherever in the line they are.

    `lead_s`: a ticket is handed over that long before its slot is free. `max_waiting_s` bounds the
    line in GPU seconds. `cold_start_s`: what a replica takes to start; where none is up, whoever
    asks for one counts on a first replica after that time.
    """

    def __init__(
        self,
        *,
        slots_per_replica: int = 1,
        lead_s: float = 0.0,
        max_waiting_s: float = NEVER,
        cold_start_s: float = 0.0,
        share_window_s: float = 60.0,
    ) -> None:
        self.lead_s = lead_s
        self.cold_start_s = cold_start_s
        self._max_waiting_s = max_waiting_s
        self._slots = Slots(slots_per_replica, lead_s)
        self._shares = Shares(share_window_s)
        self._spread = EstimateError()
        self._caches = CacheDirectory()
        # Keys within their share: people, jobs; then keys that are over it: people, jobs.
        self._lines: tuple[Line, ...] = tuple(SortedSums() for _ in range(4))
        self._places: dict[str, tuple[int, QueueEntry]] = {}
        # By latest start; those that have left the line are passed over.
        self._ends: list[tuple[float, int, str]] = []
        self._of_key: dict[str, dict[str, None]] = {}
        self._gave_way: list[RejectedEntry] = []
        self._numbers = count()
        # When somebody last asked for a replica while none was up.
        self._hoped_at = -NEVER

    @property
    def replicas(self) -> frozenset[str]:
        """Those that are up or expected, not those that drain."""
        return self._slots.names

    def learn_cold_start(self, cold_start_s: float) -> None:
        """What a replica takes to start, from now on."""
        if cold_start_s != self.cold_start_s:
            self.cold_start_s = cold_start_s
            self._slots.hope(None)

    def set_replicas(
        self, names: Iterable[str], now: float, draining: Iterable[str] = ()
    ) -> list[QueuedRequest]:
        """These are up, and those finish what they run; returned is what vanished ones had."""
        wanted = frozenset(names)
        for name in draining:
            self.drain_replica(name, now)
        lost: list[QueuedRequest] = []
        for name in sorted(self._slots.names - wanted):
            lost += self.lose_replica(name, now)
        for name in sorted(wanted):
            self.add_replica(name, now)
        return lost

    def add_replica(self, name: str, now: float) -> None:
        """It is up; nothing changes if that is known, and what it runs it goes on running."""
        self._slots.add(name)

    def expect_replica(self, name: str, ready_at: float, now: float) -> None:
        """It is starting: tickets may count on it, and wait for it, but do not go there yet."""
        self._slots.expect(name, ready_at)

    def drain_replica(self, name: str, now: float) -> None:
        """Nothing more goes there; what it runs goes on."""
        self._slots.drain(name)

    def lose_replica(self, name: str, now: float) -> list[QueuedRequest]:
        """It is gone. What it had been given is returned, and forgotten here."""
        return self._slots.lose(name)

    def replica_of(self, ticket_id: str) -> str | None:
        """The replica that a ticket was granted; None if it waits or is not here."""
        return self._slots.replica_of(ticket_id)

    def offer(self, ticket: QueuedRequest, now: float, *, is_new: bool = True) -> Rejection | None:
        """A ticket arrives; None if it is taken in. ValueError if one of that id is here.

        `is_new`: its work was never asked for before; only then it counts towards its key's share.
        """
        if ticket.ticket_id in self._places or self._slots.holds(ticket.ticket_id):
            raise ValueError(f"ticket {ticket.ticket_id} is here already")
        slack_s = self._slack_s(ticket, now)
        if is_new:
            self._shares.ask(ticket.key, ticket.weight, ticket.cost_s, now)
        self._review_shares(now)
        if slack_s < -SAME_S:
            return Rejection("the deadline is shorter than the work", NEVER)
        self._hope(now)
        new, place = self._newcomer(ticket, slack_s, now)
        reason = self._objection(new, place, now)
        if reason is None:
            self._enter(new, place)
            self._note_end(new)
            return None
        return Rejection(reason, self._retry_after_s(new, place, now))

    def forecast(self, ticket: QueuedRequest, now: float) -> Forecast:
        """What offer() would say, and when its turn would come; nothing changes."""
        slack_s = self._slack_s(ticket, now)
        had_hope, hoped_at = self._slots.is_hoping, self._hoped_at
        self._hope(now)
        try:
            return self._forecast(*self._newcomer(ticket, slack_s, now), now)
        finally:
            # Nobody has asked for a replica yet.
            self._hoped_at = hoped_at
            if not had_hope:
                self._slots.hope(None)

    def positions(self, now: float) -> dict[str, QueuePosition]:
        """Where everybody in line stands, by ticket, and in how many seconds it should be done."""
        if not self._places:
            return {}
        self._hope(now)
        free = free_times(self._slots, len(self._places), now)
        positions: dict[str, QueuePosition] = {}
        for line in self._lines:
            for waiting, start in zip(line, play(line, free), strict=True):
                ticket = waiting.ticket
                done_s = None if start == NEVER else start - now + ticket.cost_s
                positions[ticket.ticket_id] = QueuePosition(len(positions), done_s)
        return positions

    def adopt(self, ticket: QueuedRequest, replica: str, now: float) -> None:
        """The replica runs this ticket already, whether that is known to be up or not.

        `cost_s` is what is left of it. Nothing changes if it is known to be granted.
        """
        if ticket.ticket_id in self._places:
            self._leave(ticket.ticket_id)
        if not self._slots.holds(ticket.ticket_id):
            self._slots.adopt(replica, ticket, now)

    def take(self, now: float) -> tuple[list[Assignment], list[RejectedEntry]]:
        """Whose turn it is now and on which replica; and who has waited in vain."""
        refused, self._gave_way = self._gave_way, []
        while (waiting := self._next_end()) is not None and waiting.latest_start < now - SAME_S:
            self._dismiss(waiting, "its deadline can no longer be met", refused, now)
        grants: list[Assignment] = []
        for line in self._lines:
            while (first := line.first()) is not None and self._slots.can_take(now):
                self._hand_over(first, grants, refused, now)
        return grants, refused

    def progress(self, ticket_id: str, remaining_s: float, now: float) -> None:
        """A replica reports how long a granted ticket still takes; unknown ones are ignored."""
        self._slots.progress(ticket_id, remaining_s, now)

    def finish(self, ticket_id: str, now: float) -> None:
        """A ticket is done; unknown ones are ignored."""
        taken = self._slots.taken_s(ticket_id, now)
        if taken is not None:
            self._spread.note(*taken)
        self.cancel(ticket_id, now)

    def cancel(self, ticket_id: str, now: float) -> None:
        """It leaves, waiting or granted; unknown ones are ignored."""
        if ticket_id in self._places:
            self._leave(ticket_id)
        else:
            self._slots.finish(ticket_id, now)

    def wake_at(self) -> float | None:
        """When take() has something to do though nothing else happens."""
        first = self._next_end()
        if first is None:
            return None
        # A little later, so that it is surely hopeless then.
        hopeless_at = first.latest_start + 2 * SAME_S
        next_at = self._slots.next_at()
        return hopeless_at if next_at is None else min(hopeless_at, next_at)

    def waiting_s(self, now: float) -> float:
        """GPU seconds in line."""
        return sum(line.total for line in self._lines)

    def running_s(self, now: float) -> float:
        """GPU seconds granted and not done, as far as is known."""
        return self._slots.running_s(now)

    def _slack_s(self, ticket: QueuedRequest, now: float) -> float:
        """How long it can wait."""
        slack_s = ticket.deadline - ticket.cost_s - now
        if slack_s >= 0:
            return slack_s
        # Too late by the estimate: not so if that is wrong as often as others were.
        return ticket.deadline - ticket.cost_s * self._spread.least_share - now

    def _newcomer(
        self, ticket: QueuedRequest, slack_s: float, now: float
    ) -> tuple[QueueEntry, int]:
        """It, and the line for it."""
        latest_start = now + slack_s
        # The longer of two that are in no hurry must not go first only for being longer.
        due = latest_start if ticket.has_deadline else ticket.deadline
        return QueueEntry(ticket, due, latest_start, next(self._numbers)), self._place_for(ticket)

    def _place_for(self, ticket: QueuedRequest) -> int:
        return 2 * (ticket.key in self._shares.over) + ticket.is_job

    def _hope(self, now: float) -> None:
        """Count on a first replica where none is up or expected: somebody asks for it."""
        if self._slots.has_any:
            return
        is_asked_anew = not self._places and now - self._hoped_at > 2 * self.cold_start_s
        self._hoped_at = now
        if not self._slots.is_hoping or is_asked_anew:
            self._slots.hope(now + self.cold_start_s)
        elif self._slots.hoped_for_at < now:
            self._slots.hope(now + OVERDUE_SHARE * self.cold_start_s)

    def _forecast(self, new: QueueEntry, place: int, now: float) -> Forecast:
        ahead, line = self._lines[:place], self._lines[place]
        wait_s = 0.0
        if self._is_anybody_before(place) or not self._slots.can_take(now):
            wait_s = wait_of(new, ahead, line, self._slots, now)
            if choose_evictions(new, ahead, line, self._slots, now) == [new]:
                return Forecast(wait_s, is_refused=True)
        return Forecast(wait_s, is_refused=new.latest_start < now - SAME_S)

    def _is_anybody_before(self, place: int) -> bool:
        return any(self._lines[: place + 1])

    def _objection(self, new: QueueEntry, place: int, now: float) -> str | None:
        if not self._is_anybody_before(place) and self._slots.can_take(now):
            return None
        if self.waiting_s(now) + new.ticket.cost_s > self._max_waiting_s:
            return "the queue is full"
        leaving = choose_evictions(new, self._lines[:place], self._lines[place], self._slots, now)
        if leaving == [new]:
            if self._slots.is_hoping:
                return f"no replica is up, and one takes {self.cold_start_s:.0f} s to start"
            return "it could not be done by its deadline"
        for waiting in leaving:
            self._dismiss(waiting, "it gave way to shorter work", self._gave_way, now)
        return None

    def _hand_over(
        self,
        waiting: QueueEntry,
        grants: list[Assignment],
        refused: list[RejectedEntry],
        now: float,
    ) -> None:
        ticket = waiting.ticket
        preferred = self._caches.savings(ticket).items() if ticket.affinity else ()
        slot: Slot = self._slots.choose(preferred, now)
        if slot.tickets and slot.free_at > waiting.latest_start + SAME_S:
            self._dismiss(waiting, "its deadline can no longer be met", refused, now)
            return
        self._leave(ticket.ticket_id)
        self._slots.start(slot, ticket, now)
        self._caches.note(ticket, slot.replica)
        grants.append(Assignment(ticket, slot.replica))

    def _dismiss(
        self, waiting: QueueEntry, reason: str, refused: list[RejectedEntry], now: float
    ) -> None:
        self._leave(waiting.ticket.ticket_id)
        retry_after_s = self._retry_after_s(waiting, self._place_for(waiting.ticket), now)
        refused.append(RejectedEntry(waiting.ticket, Rejection(reason, retry_after_s)))

    def _retry_after_s(self, waiting: QueueEntry, place: int, now: float) -> float:
        """After how long it would be taken in, with as much time as now, if nobody else came."""
        self._hope(now)
        slack_s = max(waiting.latest_start - now, 0.0)
        num_waiting = len(self._places)
        if num_waiting > MAX_PLAYED:
            begun = free = level(capacity_curve(self._slots, now), self.waiting_s(now), now)
        else:
            times = free_times(self._slots, num_waiting + 1, now)
            starts = [start for line in self._lines for start in play(line, times)]
            begun = max((start for start in starts if start < NEVER), default=now)
            free = times[0]
        if self._would_be_last(waiting, place):
            # Nobody stands behind it whom it could make late.
            begun = now
        return max(begun - now, free - slack_s - now, 0.0) + 2 * SAME_S

    def _would_be_last(self, waiting: QueueEntry, place: int) -> bool:
        line = self._lines[place]
        return line.before(waiting.key)[0] == len(line) and not any(self._lines[place + 1 :])

    def _next_end(self) -> QueueEntry | None:
        """The waiting ticket that is hopeless first."""
        while self._ends:
            _, number, ticket_id = self._ends[0]
            entry = self._places.get(ticket_id)
            if entry is not None and entry[1].number == number:
                return entry[1]
            heapq.heappop(self._ends)
        return None

    def _note_end(self, waiting: QueueEntry) -> None:
        if len(self._ends) > 2 * len(self._places) + 64:
            kept = (waiting for _, waiting in self._places.values())
            self._ends = [(each.latest_start, each.number, each.ticket.ticket_id) for each in kept]
            heapq.heapify(self._ends)
        else:
            entry = (waiting.latest_start, waiting.number, waiting.ticket.ticket_id)
            heapq.heappush(self._ends, entry)

    def _enter(self, waiting: QueueEntry, place: int) -> None:
        ticket = waiting.ticket
        self._lines[place].add(waiting.key, ticket.cost_s, waiting)
        self._places[ticket.ticket_id] = place, waiting
        self._of_key.setdefault(ticket.key, {})[ticket.ticket_id] = None

    def _leave(self, ticket_id: str) -> None:
        place, waiting = self._places.pop(ticket_id)
        self._lines[place].remove(waiting.key)
        mates = self._of_key[waiting.ticket.key]
        del mates[ticket_id]
        if not mates:
            del self._of_key[waiting.ticket.key]

    def _review_shares(self, now: float) -> None:
        if not self._shares.is_due(now):
            return
        for key in sorted(self._shares.review(self._slots.num, now)):
            for ticket_id in list(self._of_key.get(key, ())):
                _, waiting = self._places[ticket_id]
                self._leave(ticket_id)
                self._enter(waiting, self._place_for(waiting.ticket))
