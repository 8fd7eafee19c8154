"""The queue of a tier, one for the whole cluster: admission, order, and choice of replica."""

import heapq
from collections.abc import Iterable
from itertools import count

from flux_ray.request import QueuePosition
from flux_ray.router.queue.admission import (
    MAX_SIMULATED,
    NEVER,
    SAME_S,
    EstimateError,
    Forecast,
    Line,
    QueueEntry,
    capacity_curve,
    choose_evictions,
    free_times,
    simulate_starts,
    wait_of,
    water_level,
)
from flux_ray.router.queue.entry import Assignment, QueuedRequest, RejectedEntry, Rejection
from flux_ray.router.queue.shares import Shares
from flux_ray.router.queue.slots import CacheDirectory, Slot, Slots
from flux_ray.router.queue.sums import SortedSums

# While a replica takes longer to start than `cold_start_s`, it is expected after this share of it
# more; without that, its time would lie in the past and every request would count on it at once.
OVERDUE_SHARE = 0.25


class TierQueue:
    """A queue of requests in order of the time by which they should start, assigned late.

    A plain object, used by the ledger and the simulator: every method is told the time, and none
    waits. Call take() after any other method, and at wake_at().

    Order: requests with a deadline go by their latest start, the others by arrival. Keys that ask
    for more than their share of the replica seconds wait behind all others (shares.py), and within
    both classes jobs wait behind people. What is behind gives way to what is in front.

    Admission: a request is admitted if it will start by its latest start. If it would be late, or
    make another late, the longest waiting request without which all are in time is evicted, or
    the newcomer if none is longer (admission.py). No request is refused that could be served in
    time, and one that cannot is refused by its latest start, wherever in the queue it is.

    `lead_s`: a request is handed over that long before its slot is free. `max_waiting_s` bounds the
    queue in replica seconds. `cold_start_s` is how long a replica takes to start; while none is up,
    requests count on a first replica after that time.
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
        self._estimate_error = EstimateError()
        self._caches = CacheDirectory()
        # Of keys within their share: people, jobs; then of keys that are over it: people, jobs.
        self._lines: tuple[Line, ...] = tuple(SortedSums() for _ in range(4))
        self._places: dict[str, tuple[int, QueueEntry]] = {}
        # A heap by latest start; entries of requests that have left are skipped when they come up.
        self._ends: list[tuple[float, int, str]] = []
        self._of_key: dict[str, dict[str, None]] = {}
        self._evicted: list[RejectedEntry] = []
        self._numbers = count()
        # When a request last counted on a first replica while none was up.
        self._hoped_at = -NEVER
        # When a request was last refused while no replica was up or starting.
        self.turned_away_at = -NEVER

    @property
    def replicas(self) -> frozenset[str]:
        """The replicas that are up or starting, without those that drain."""
        return self._slots.names

    @property
    def num_waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._places)

    def learn_cold_start(self, cold_start_s: float) -> None:
        """Set how long a replica takes to start, from now on."""
        if self._slots.is_hoping:
            # Hoped for anew, it would never come: after a deploy, gateways that go by the old
            # replicas and the policy go on to say different values, by turns.
            self._slots.hope(self._slots.hoped_for_at + cold_start_s - self.cold_start_s)
        self.cold_start_s = cold_start_s

    def set_replicas(
        self, names: Iterable[str], now: float, draining: Iterable[str] = ()
    ) -> list[QueuedRequest]:
        """Set which replicas are up and which drain; return the requests of vanished ones."""
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
        """Note that a replica is up; one that is known to be up stays as it is."""
        self._slots.add(name)

    def expect_replica(self, name: str, ready_at: float, now: float) -> None:
        """Note that a replica is starting: requests may wait for it, but are not assigned to it."""
        self._slots.expect(name, ready_at)

    def drain_replica(self, name: str, now: float) -> None:
        """Assign the replica nothing more; what it runs goes on."""
        self._slots.drain(name)

    def lose_replica(self, name: str, now: float) -> list[QueuedRequest]:
        """Remove a dead replica; return, and forget, the requests that it had not finished."""
        return self._slots.lose(name)

    def replica_of(self, ticket_id: str) -> str | None:
        """Return the replica that a request is assigned to; None if it waits or is unknown."""
        return self._slots.replica_of(ticket_id)

    def still_runs(self, ticket_id: str, since: float, now: float) -> bool:
        """Return whether a request that had begun by `since` takes longer, as far as is known."""
        return self._slots.still_runs(ticket_id, since, now)

    def submit(
        self, request: QueuedRequest, now: float, *, is_new: bool = True
    ) -> Rejection | None:
        """Admit a request and return None, or return why not.

        Raise ValueError if a request of that id is here. `is_new` is false for work that was asked
        for before, which does not count towards the share of its key again.
        """
        if request.ticket_id in self._places or self._slots.holds(request.ticket_id):
            raise ValueError(f"ticket {request.ticket_id} is here already")
        slack_s = self._slack_s(request, now)
        if is_new:
            self._shares.ask(request.key, request.weight, request.cost_s, now)
        self._review_shares(now)
        if slack_s < -SAME_S:
            return Rejection("the deadline is shorter than the work", NEVER)
        self._hope(now)
        new, place = self._newcomer(request, slack_s, now)
        reason = self._objection(new, place, now)
        if reason is None:
            self._enter(new, place)
            self._note_end(new)
            return None
        if not self._slots.has_any:
            self.turned_away_at = now
        return Rejection(reason, self._retry_after_s(new, place, now))

    def forecast(self, request: QueuedRequest, now: float) -> Forecast:
        """Predict submit()'s answer and how long the request would wait; change nothing."""
        slack_s = self._slack_s(request, now)
        had_hope, hoped_at = self._slots.is_hoping, self._hoped_at
        self._hope(now)
        try:
            return self._forecast(*self._newcomer(request, slack_s, now), now)
        finally:
            # A forecast asks for no replica, so take back the hope for one.
            self._hoped_at = hoped_at
            if not had_hope:
                self._slots.hope(None)

    def positions(self, now: float) -> dict[str, QueuePosition]:
        """Return the position of every waiting request, by id, and the seconds until it is done."""
        if not self._places:
            return {}
        self._hope(now)
        free = free_times(self._slots, len(self._places), now)
        positions: dict[str, QueuePosition] = {}
        for line in self._lines:
            for entry, start in zip(line, simulate_starts(line, free), strict=True):
                request = entry.request
                done_s = None if start == NEVER else start - now + request.cost_s
                positions[request.ticket_id] = QueuePosition(len(positions), done_s)
        return positions

    def adopt(self, request: QueuedRequest, replica: str, now: float) -> None:
        """Note that a replica runs this request already, whether or not it is known to be up.

        `cost_s` is what is left of it. Nothing changes if the request is known to be assigned.
        """
        if request.ticket_id in self._places:
            self._leave(request.ticket_id)
        if not self._slots.holds(request.ticket_id):
            self._slots.adopt(replica, request, now)

    def take(self, now: float) -> tuple[list[Assignment], list[RejectedEntry]]:
        """Return the assignments that are due now, and the requests that waited in vain."""
        rejected, self._evicted = self._evicted, []
        while (entry := self._next_end()) is not None and entry.latest_start < now - SAME_S:
            self._dismiss(entry, "its deadline can no longer be met", rejected, now)
        assignments: list[Assignment] = []
        for line in self._lines:
            while (first := line.first()) is not None and self._slots.can_take(now):
                self._hand_over(first, assignments, rejected, now)
        return assignments, rejected

    def progress(self, ticket_id: str, remaining_s: float, now: float) -> None:
        """Correct how long an assigned request still takes; ignore an unknown one."""
        self._slots.progress(ticket_id, remaining_s, now)

    def finish(self, ticket_id: str, now: float) -> None:
        """Remove a finished request, and learn from what it took; ignore an unknown one."""
        taken = self._slots.taken_s(ticket_id, now)
        if taken is not None:
            self._estimate_error.note(*taken)
        self.cancel(ticket_id, now)

    def cancel(self, ticket_id: str, now: float) -> None:
        """Remove a request, waiting or assigned; ignore an unknown one."""
        if ticket_id in self._places:
            self._leave(ticket_id)
        else:
            self._slots.finish(ticket_id, now)

    def wake_at(self) -> float | None:
        """Return when take() is to be called next if nothing else happens; None if never."""
        first = self._next_end()
        if first is None:
            return None
        # A little later, so that rounding cannot make it look still in time.
        hopeless_at = first.latest_start + 2 * SAME_S
        next_at = self._slots.next_at()
        return hopeless_at if next_at is None else min(hopeless_at, next_at)

    def waiting_s(self, now: float) -> float:
        """Return the replica seconds of all waiting requests."""
        return sum(line.total for line in self._lines)

    def running_s(self, now: float) -> float:
        """Return the replica seconds that assigned requests still take, as far as is known."""
        return self._slots.running_s(now)

    def _slack_s(self, request: QueuedRequest, now: float) -> float:
        """Return how long the request can wait and still meet its deadline."""
        slack_s = request.deadline - request.cost_s - now
        if slack_s >= 0:
            return slack_s
        # Too late by its price; but prices err, and the request may take less (EstimateError).
        return request.deadline - request.cost_s * self._estimate_error.least_share - now

    def _newcomer(
        self, request: QueuedRequest, slack_s: float, now: float
    ) -> tuple[QueueEntry, int]:
        """Return the entry of a new request, and the index of the line that it belongs in."""
        latest_start = now + slack_s
        # Without a deadline, latest start would put the longer of two requests first.
        due = latest_start if request.has_deadline else request.deadline
        return QueueEntry(request, due, latest_start, next(self._numbers)), self._place_for(request)

    def _place_for(self, request: QueuedRequest) -> int:
        return 2 * (request.key in self._shares.over) + request.is_job

    def _hope(self, now: float) -> None:
        """Count on a first replica if none is up or starting, because a request asks for one."""
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
        if self.waiting_s(now) + new.request.cost_s > self._max_waiting_s:
            return "the queue is full"
        leaving = choose_evictions(new, self._lines[:place], self._lines[place], self._slots, now)
        if leaving == [new]:
            if self._slots.is_hoping:
                return f"no replica is up, and one takes {self.cold_start_s:.0f} s to start"
            return "it could not be done by its deadline"
        for entry in leaving:
            self._dismiss(entry, "it gave way to shorter work", self._evicted, now)
        return None

    def _hand_over(
        self,
        entry: QueueEntry,
        assignments: list[Assignment],
        rejected: list[RejectedEntry],
        now: float,
    ) -> None:
        request = entry.request
        preferred = self._caches.savings(request).items() if request.affinity else ()
        slot: Slot = self._slots.choose(preferred, now)
        if slot.requests and slot.free_at > entry.latest_start + SAME_S:
            self._dismiss(entry, "its deadline can no longer be met", rejected, now)
            return
        self._leave(request.ticket_id)
        self._slots.start(slot, request, now)
        self._caches.note(request, slot.replica)
        assignments.append(Assignment(request, slot.replica))

    def _dismiss(
        self, entry: QueueEntry, reason: str, rejected: list[RejectedEntry], now: float
    ) -> None:
        self._leave(entry.request.ticket_id)
        retry_after_s = self._retry_after_s(entry, self._place_for(entry.request), now)
        rejected.append(RejectedEntry(entry.request, Rejection(reason, retry_after_s)))

    def _retry_after_s(self, entry: QueueEntry, place: int, now: float) -> float:
        """Return after how long the same request would be admitted if nothing else arrived."""
        self._hope(now)
        slack_s = max(entry.latest_start - now, 0.0)
        num_waiting = len(self._places)
        if num_waiting > MAX_SIMULATED:
            begun = free = water_level(capacity_curve(self._slots, now), self.waiting_s(now), now)
        else:
            times = free_times(self._slots, num_waiting + 1, now)
            starts = [start for line in self._lines for start in simulate_starts(line, times)]
            begun = max((start for start in starts if start < NEVER), default=now)
            free = times[0]
        if self._would_be_last(entry, place):
            # No request waits behind it that it could make late.
            begun = now
        return max(begun - now, free - slack_s - now, 0.0) + 2 * SAME_S

    def _would_be_last(self, entry: QueueEntry, place: int) -> bool:
        line = self._lines[place]
        return line.before(entry.key)[0] == len(line) and not any(self._lines[place + 1 :])

    def _next_end(self) -> QueueEntry | None:
        """Return the waiting request whose latest start comes first."""
        while self._ends:
            _, number, ticket_id = self._ends[0]
            _, found = self._places.get(ticket_id, (0, None))
            if found is not None and found.number == number:
                return found
            heapq.heappop(self._ends)
        return None

    def _note_end(self, entry: QueueEntry) -> None:
        if len(self._ends) > 2 * len(self._places) + 64:
            kept = (entry for _, entry in self._places.values())
            self._ends = [(each.latest_start, each.number, each.request.ticket_id) for each in kept]
            heapq.heapify(self._ends)
        else:
            end = (entry.latest_start, entry.number, entry.request.ticket_id)
            heapq.heappush(self._ends, end)

    def _enter(self, entry: QueueEntry, place: int) -> None:
        request = entry.request
        self._lines[place].add(entry.key, request.cost_s, entry)
        self._places[request.ticket_id] = place, entry
        self._of_key.setdefault(request.key, {})[request.ticket_id] = None

    def _leave(self, ticket_id: str) -> None:
        place, entry = self._places.pop(ticket_id)
        self._lines[place].remove(entry.key)
        mates = self._of_key[entry.request.key]
        del mates[ticket_id]
        if not mates:
            del self._of_key[entry.request.key]

    def _review_shares(self, now: float) -> None:
        if not self._shares.is_due(now):
            return
        for key in sorted(self._shares.review(self._slots.num, now)):
            for ticket_id in list(self._of_key.get(key, ())):
                _, entry = self._places[ticket_id]
                self._leave(ticket_id)
                self._enter(entry, self._place_for(entry.request))
