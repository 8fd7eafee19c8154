"""The queue of a tier, one for the whole cluster: who is taken in, whose turn it is, and where."""

from collections.abc import Iterable
from itertools import count

from flux_ray.router.admission import MAX_PLAYED, Line, give_way, wait_of
from flux_ray.router.caches import Caches
from flux_ray.router.forecast import (
    NEVER,
    SAME_S,
    Forecast,
    Waiting,
    capacity_curve,
    free_times,
    level,
    play,
)
from flux_ray.router.patience import Patience
from flux_ray.router.shares import Shares
from flux_ray.router.slots import Slot, Slots
from flux_ray.router.spread import Spread
from flux_ray.router.sums import SortedSums
from flux_ray.router.ticket import Grant, Refusal, Refused, Ticket

# What a refused request may count on of the patience of now, when it comes again.
KEPT_PATIENCE = 0.5


class TierQueue:
    """Tickets wait in order of the time by which they should start, and are bound late.

    A plain object: every method is told the time, and none waits. Call take() after anything else,
    and at wake_at().

    Taken in is a ticket that will start by its due time: its latest start, or earlier where long
    work crowds out short (patience.py). Where it would be late, or make another late, the longest
    waiting ticket without which all are in time gives way, or the newcomer if none is longer
    (admission.py). Keys that ask for more than their share of the GPU seconds wait behind all
    others (shares.py); what is behind gives way to what is in front.

    `lead_s`: a ticket is handed over that long before its slot is free. `max_waiting_s` bounds the
    line in GPU seconds. `cold_start_s`: with no replica at all, one is hoped for after that time.
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
        self._max_waiting_s = max_waiting_s
        self._cold_start_s = cold_start_s
        self._slots = Slots(slots_per_replica, lead_s)
        self._patience = Patience()
        self._shares = Shares(share_window_s)
        self._spread = Spread()
        self._caches = Caches()
        # In front: keys within their share.
        self._lines: tuple[Line, Line] = (SortedSums(), SortedSums())
        self._places: dict[str, tuple[int, Waiting]] = {}
        self._of_key: dict[str, dict[str, None]] = {}
        self._gave_way: list[Refused] = []
        self._numbers = count()

    def set_replicas(
        self, names: Iterable[str], now: float, draining: Iterable[str] = ()
    ) -> list[Ticket]:
        """These are up, and those finish what they run; returned is what vanished ones had."""
        wanted = frozenset(names)
        for name in draining:
            self.drain_replica(name, now)
        lost: list[Ticket] = []
        for name in sorted(self._slots.names - wanted):
            lost += self.lose_replica(name, now)
        for name in sorted(wanted):
            self.add_replica(name, now)
        return lost

    def add_replica(self, name: str, now: float) -> None:
        """It is up and free; nothing changes if that is known."""
        self._slots.add(name)

    def expect_replica(self, name: str, ready_at: float, now: float) -> None:
        """It is starting: tickets may count on it, and wait for it, but do not go there yet."""
        self._slots.expect(name, ready_at)

    def drain_replica(self, name: str, now: float) -> None:
        """Nothing more goes there; what it runs goes on."""
        self._slots.drain(name)

    def lose_replica(self, name: str, now: float) -> list[Ticket]:
        """It is gone. What it had been given is returned, and forgotten here."""
        return self._slots.lose(name)

    def offer(self, ticket: Ticket, now: float) -> Refusal | None:
        """A ticket arrives; None if it is taken in. ValueError if one of that id is here."""
        if ticket.ticket_id in self._places or self._slots.holds(ticket.ticket_id):
            raise ValueError(f"ticket {ticket.ticket_id} is here already")
        slack_s = self._slack_s(ticket, now)
        self._shares.ask(ticket.key, ticket.weight, ticket.cost_s, now)
        self._review_shares(now)
        if slack_s < -SAME_S:
            return Refusal("the deadline is shorter than the work", NEVER)
        self._patience.see(slack_s)
        new, place = self._newcomer(ticket, slack_s, now)
        reason = self._objection(new, place, now)
        if reason is None:
            self._enter(new, place)
            return None
        self._patience.decide(ticket.cost_s, is_served=False)
        return Refusal(reason, self._retry_after_s(slack_s, now))

    def forecast(self, ticket: Ticket, now: float) -> Forecast:
        """What offer() would say, and when its turn would come; nothing changes."""
        slack_s = self._slack_s(ticket, now)
        if not self._slots.num:
            return Forecast(None, is_refused=slack_s < self._cold_start_s)
        new, place = self._newcomer(ticket, slack_s, now)
        ahead, line = self._lines[:place], self._lines[place]
        wait_s = 0.0
        if line or not self._slots.can_take(now):
            wait_s = wait_of(new, ahead, line, self._slots, now)
            if give_way(new, ahead, line, self._slots, now) == [new]:
                return Forecast(wait_s, is_refused=True)
        return Forecast(wait_s, is_refused=slack_s < -SAME_S)

    def begin(self, ticket: Ticket, replica: str, now: float) -> None:
        """The ticket arrives, and began on this replica at once: there was nothing to decide."""
        self._shares.ask(ticket.key, ticket.weight, ticket.cost_s, now)
        self._review_shares(now)
        self._patience.see(self._slack_s(ticket, now))
        self._patience.decide(ticket.cost_s, is_served=True)
        self._caches.note(ticket, replica)
        self.adopt(ticket, replica, now)

    def adopt(self, ticket: Ticket, replica: str, now: float) -> None:
        """The replica runs this ticket already: what is known is from before this queue.

        `cost_s` is what is left of it. Nothing changes if it is known to be granted.
        """
        if ticket.ticket_id in self._places:
            self._leave(ticket.ticket_id)
        if not self._slots.holds(ticket.ticket_id):
            self._slots.adopt(replica, ticket, now)

    def take(self, now: float) -> tuple[list[Grant], list[Refused]]:
        """Whose turn it is now and on which replica; and who has waited in vain."""
        refused, self._gave_way = self._gave_way, []
        grants: list[Grant] = []
        for line in self._lines:
            while (waiting := line.first()) is not None:
                if waiting.latest_start < now - SAME_S:
                    self._dismiss(waiting, "its deadline can no longer be met", refused, now)
                elif self._slots.can_take(now):
                    self._hand_over(waiting, grants, refused, now)
                else:
                    break
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
        firsts = [first for line in self._lines if (first := line.first()) is not None]
        if not firsts:
            return None
        # A little later, so that it is surely hopeless then.
        times = [first.latest_start + 2 * SAME_S for first in firsts]
        next_at = self._slots.next_at()
        return min(times if next_at is None else [*times, next_at])

    def waiting_s(self, now: float) -> float:
        """GPU seconds in line."""
        front, behind = self._lines
        return front.total + behind.total

    def running_s(self, now: float) -> float:
        """GPU seconds granted and not done, as far as is known."""
        return self._slots.running_s(now)

    def _slack_s(self, ticket: Ticket, now: float) -> float:
        """How long it can wait."""
        slack_s = ticket.deadline - ticket.cost_s - now
        if slack_s >= 0:
            return slack_s
        # Too late by the estimate: not so if that is wrong as often as others were.
        return ticket.deadline - ticket.cost_s * self._spread.least_share - now

    def _newcomer(self, ticket: Ticket, slack_s: float, now: float) -> tuple[Waiting, int]:
        """It, and the line for it."""
        due = now + min(slack_s, self._patience.limit_s)
        new = Waiting(ticket, due, now + slack_s, next(self._numbers))
        return new, int(ticket.key in self._shares.over)

    def _objection(self, new: Waiting, place: int, now: float) -> str | None:
        line = self._lines[place]
        if not line and self._slots.can_take(now):
            return None
        if self.waiting_s(now) + new.ticket.cost_s > self._max_waiting_s:
            return "the queue is full"
        if not self._slots.num:
            is_hopeless = new.latest_start < now + self._cold_start_s
            return "no replica is up" if is_hopeless else None
        leaving = give_way(new, self._lines[:place], line, self._slots, now)
        if leaving == [new]:
            return "it could not be done by its deadline"
        for waiting in leaving:
            self._dismiss(waiting, "it gave way to shorter work", self._gave_way, now)
        return None

    def _hand_over(
        self, waiting: Waiting, grants: list[Grant], refused: list[Refused], now: float
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
        self._patience.decide(ticket.cost_s, is_served=True)
        grants.append(Grant(ticket, slot.replica))

    def _dismiss(self, waiting: Waiting, reason: str, refused: list[Refused], now: float) -> None:
        ticket = waiting.ticket
        self._leave(ticket.ticket_id)
        self._patience.decide(ticket.cost_s, is_served=False)
        retry_after_s = self._retry_after_s(0.0, now)
        refused.append(Refused(ticket, Refusal(reason, retry_after_s)))

    def _retry_after_s(self, slack_s: float, now: float) -> float:
        """When all that waits has begun, and a slot is free within what a newcomer can wait."""
        if not self._slots.num:
            return max(self._cold_start_s - slack_s, 0.0)
        kept_s = min(slack_s, KEPT_PATIENCE * self._patience.limit_s)
        num_waiting = len(self._places)
        if num_waiting > MAX_PLAYED:
            begun = free = level(capacity_curve(self._slots, now), self.waiting_s(now), now)
        else:
            times = free_times(self._slots, num_waiting + 1, now)
            starts = [start for line in self._lines for start in play(line, times)]
            begun = max((start for start in starts if start < NEVER), default=now)
            free = times[0]
        return max(begun - now, free - kept_s - now, 0.0) + 2 * SAME_S

    def _enter(self, waiting: Waiting, place: int) -> None:
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
                self._enter(waiting, int(key in self._shares.over))
