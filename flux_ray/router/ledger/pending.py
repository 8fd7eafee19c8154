"""The requests that a gateway has submitted and not ended, and what to report of them."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from flux_ray.request import QueuePosition
from flux_ray.router.ledger.messages import Decision, GatewayReport, ReportReply, SubmitRequest
from flux_ray.router.ledger.quota_client import PendingQuota

Decide = Callable[[Decision], None]
Watch = Callable[[QueuePosition], None]


@dataclass(eq=False)
class PendingRequest:
    """A request of this gateway, from its arrival to its end.

    `decide` is called once, with what the ledger decided. `watch`, if set, is called with its queue
    positions while it waits. `quota`: what it counts against its key's limits, if there are any.
    """

    offer: SubmitRequest
    asked_at: float
    decide: Decide
    watch: Watch | None = None
    replica: str | None = None
    is_decided: bool = False
    # The seconds that it still took, and when that was.
    left: tuple[float, float] = (math.inf, 0.0)
    quota: PendingQuota | None = None

    def left_s(self, now: float) -> float:
        """Return the seconds that a running request still takes."""
        left_s, known_at = self.left
        return max(0.0, left_s - (now - known_at))

    def offer_at(self, now: float) -> SubmitRequest:
        """Return the request as it is to be submitted now, to this ledger or a new one."""
        deadline_in_s = self.offer.deadline_in_s - (now - self.asked_at)
        quota = None if self.quota is None else self.quota.request()
        offer = replace(self.offer, deadline_in_s=deadline_in_s, quota=quota)
        if self.replica is None:
            return offer
        return replace(offer, cost_s=self.left_s(now), runs_on=self.replica)


@dataclass
class News:
    """What the ledger has not been told yet: requests to submit, and tickets that have changed.

    `done` are those of `ended` that succeeded; of `moved` the remaining time has changed.
    """

    offers: list[PendingRequest]
    ended: list[str]
    done: list[str]
    moved: set[str]

    def before(self, later: "News") -> "News":
        """Return this news and `later` in one."""
        return News(
            self.offers + later.offers,
            self.ended + later.ended,
            self.done + later.done,
            self.moved | later.moved,
        )


def nothing() -> News:
    return News([], [], [], set())


class PendingRequests:
    """Keep all requests of this gateway that wait or run, and make its reports to the ledger.

    `LedgerClient` calls it from the gateway's event loop: `statement`, then `heard` with the reply,
    or `missed`; one report at a time. `now` is in seconds, monotonic.
    """

    def __init__(self) -> None:
        self._turns: dict[str, PendingRequest] = {}
        self._news = nothing()
        self._said = nothing()
        self._number = 0
        self._tells_all = True

    @property
    def has_to_tell_all(self) -> bool:
        """Return whether the ledger may have lost what it was told, or never heard it."""
        return self._tells_all

    def ask(
        self,
        offer: SubmitRequest,
        now: float,
        decide: Decide,
        watch: Watch | None = None,
        quota: PendingQuota | None = None,
    ) -> None:
        """Submit a request with the next report; `decide` is called with the decision."""
        turn = PendingRequest(offer, now, decide, watch, quota=quota)
        self._turns[offer.ticket_id] = turn
        self._news.offers.append(turn)

    def progress(self, ticket_id: str, left_s: float, now: float) -> None:
        """Note how many seconds a running request still takes; an unknown one is ignored."""
        turn = self._turns.get(ticket_id)
        if turn is not None:
            turn.left = left_s, now
            self._news.moved.add(ticket_id)

    def end(self, ticket_id: str, *, is_done: bool = False) -> bool:
        """End a request, successfully or not; return whether it was known."""
        if self._turns.pop(ticket_id, None) is None:
            return False
        self._news.ended.append(ticket_id)
        if is_done:
            self._news.done.append(ticket_id)
        return True

    def statement(
        self,
        now: float,
        replicas: Mapping[str, tuple[str, ...]],
        cold_starts: Mapping[str, float],
        *,
        is_beat: bool = False,
    ) -> GatewayReport:
        """Make a report of what is new; on a beat or after a lost report, of all that is known."""
        tells_all = is_beat or self._tells_all
        said, self._news = self._news, nothing()
        # The clients of some may have left before the ledger was told of them.
        said.offers = [turn for turn in said.offers if turn.offer.ticket_id in self._turns]
        self._said = said
        self._number += 1
        moved = [(each, self._turns[each]) for each in sorted(said.moved) if each in self._turns]
        news = GatewayReport(
            tuple(turn.offer_at(now) for turn in said.offers),
            tuple(said.ended),
            replicas,
            done=tuple(said.done),
            left_s=tuple((ticket_id, turn.left_s(now)) for ticket_id, turn in moved),
            number=self._number,
        )
        if not tells_all:
            return news
        waiting = {each: turn for each, turn in self._turns.items() if not turn.is_decided}
        return replace(
            news,
            known=frozenset(self._turns),
            waiting=frozenset(waiting),
            watched=tuple(each for each, turn in waiting.items() if turn.watch is not None),
            cold_starts=cold_starts,
        )

    def heard(self, reply: ReportReply, now: float) -> bool:
        """Apply the reply to the last report; return whether the ledger lacks some requests."""
        self._tells_all = False
        for turn in self._said.offers:
            turn.offer = replace(turn.offer, is_counted=True)
        self._said = nothing()
        for ticket_id, status in reply.admitted:
            turn_of = self._turns.get(ticket_id)
            if turn_of is not None and turn_of.quota is not None:
                turn_of.quota.admit(status)
        self.decide(reply.decisions, now)
        for ticket_id, position in reply.positions:
            waiting = self._turns.get(ticket_id)
            if waiting is not None and waiting.watch is not None and not waiting.is_decided:
                waiting.watch(position)
        asked_for = (self._turns[each] for each in reply.unknown if each in self._turns)
        # It has forgotten what it has just refused: submitted again, that would be refused twice.
        lacking = [turn for turn in asked_for if turn.replica is not None or not turn.is_decided]
        self._news.offers += lacking
        return bool(lacking)

    def missed(self) -> None:
        """Tell the last report again, with all that is known: it may have been heard or not."""
        self._news, self._said = self._said.before(self._news), nothing()
        self._tells_all = True

    def decide(self, decisions: Iterable[Decision], now: float) -> None:
        """Apply decisions; ignore those that were applied before or whose request has ended."""
        for decision in decisions:
            turn = self._turns.get(decision.ticket_id)
            if turn is None or turn.is_decided:
                continue
            turn.is_decided = True
            if decision.replica is not None:
                turn.replica, turn.left = decision.replica, (turn.offer.cost_s, now)
            turn.decide(decision)
