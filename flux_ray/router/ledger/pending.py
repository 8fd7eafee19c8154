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

    submission: SubmitRequest
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

    def submission_at(self, now: float) -> SubmitRequest:
        """Return the request as it is to be submitted now, to this ledger or a new one."""
        deadline_in_s = self.submission.deadline_in_s - (now - self.asked_at)
        quota = None if self.quota is None else self.quota.request()
        submission = replace(self.submission, deadline_in_s=deadline_in_s, quota=quota)
        if self.replica is None:
            return submission
        return replace(submission, cost_s=self.left_s(now), runs_on=self.replica)


@dataclass
class News:
    """What the ledger has not been told yet: requests to submit, and tickets that have changed.

    `done` are those of `ended` that succeeded; of `moved` the remaining time has changed.
    """

    submissions: list[PendingRequest]
    ended: list[str]
    done: list[str]
    moved: set[str]

    def before(self, later: "News") -> "News":
        """Return this news and `later` in one."""
        return News(
            self.submissions + later.submissions,
            self.ended + later.ended,
            self.done + later.done,
            self.moved | later.moved,
        )


def nothing() -> News:
    return News([], [], [], set())


class PendingRequests:
    """Keep all requests of this gateway that wait or run, and make its reports to the ledger.

    `LedgerClient` calls it from the gateway's event loop: `report`, then `heard` with the reply,
    or `missed`; one report at a time. `now` is in seconds, monotonic.
    """

    def __init__(self) -> None:
        self._requests: dict[str, PendingRequest] = {}
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
        submission: SubmitRequest,
        now: float,
        decide: Decide,
        watch: Watch | None = None,
        quota: PendingQuota | None = None,
    ) -> None:
        """Submit a request with the next report; `decide` is called with the decision."""
        pending = PendingRequest(submission, now, decide, watch, quota=quota)
        self._requests[submission.ticket_id] = pending
        self._news.submissions.append(pending)

    def progress(self, ticket_id: str, left_s: float, now: float) -> None:
        """Note how many seconds a running request still takes; an unknown one is ignored."""
        pending = self._requests.get(ticket_id)
        if pending is not None:
            pending.left = left_s, now
            self._news.moved.add(ticket_id)

    def end(self, ticket_id: str, *, is_done: bool = False) -> bool:
        """End a request, successfully or not; return whether it was known."""
        if self._requests.pop(ticket_id, None) is None:
            return False
        self._news.ended.append(ticket_id)
        if is_done:
            self._news.done.append(ticket_id)
        return True

    def report(
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
        known = self._requests
        said.submissions = [new for new in said.submissions if new.submission.ticket_id in known]
        self._said = said
        self._number += 1
        moved = [(each, known[each]) for each in sorted(said.moved) if each in known]
        news = GatewayReport(
            tuple(new.submission_at(now) for new in said.submissions),
            tuple(said.ended),
            replicas,
            done=tuple(said.done),
            left_s=tuple((ticket_id, pending.left_s(now)) for ticket_id, pending in moved),
            number=self._number,
        )
        if not tells_all:
            return news
        waiting = {each: pending for each, pending in known.items() if not pending.is_decided}
        return replace(
            news,
            known=frozenset(known),
            waiting=frozenset(waiting),
            watched=tuple(each for each, pending in waiting.items() if pending.watch is not None),
            cold_starts=cold_starts,
        )

    def heard(self, reply: ReportReply, now: float) -> bool:
        """Apply the reply to the last report; return whether the ledger lacks some requests."""
        self._tells_all = False
        for pending in self._said.submissions:
            pending.submission = replace(pending.submission, is_counted=True)
        self._said = nothing()
        for ticket_id, status in reply.admitted:
            admitted = self._requests.get(ticket_id)
            if admitted is not None and admitted.quota is not None:
                admitted.quota.admit(status)
        self.decide(reply.decisions, now)
        for ticket_id, position in reply.positions:
            waiting = self._requests.get(ticket_id)
            if waiting is not None and waiting.watch is not None and not waiting.is_decided:
                waiting.watch(position)
        asked_for = (self._requests[each] for each in reply.unknown if each in self._requests)
        # It has forgotten what it has just refused: submitted again, that would be refused twice.
        lacking = [
            pending
            for pending in asked_for
            if pending.replica is not None or not pending.is_decided
        ]
        self._news.submissions += lacking
        return bool(lacking)

    def missed(self) -> None:
        """Tell the last report again, with all that is known: it may have been heard or not."""
        self._news, self._said = self._said.before(self._news), nothing()
        self._tells_all = True

    def decide(self, decisions: Iterable[Decision], now: float) -> None:
        """Apply decisions; ignore those that were applied before or whose request has ended."""
        for decision in decisions:
            pending = self._requests.get(decision.ticket_id)
            if pending is None or pending.is_decided:
                continue
            pending.is_decided = True
            if decision.replica is not None:
                pending.replica, pending.left = decision.replica, (pending.submission.cost_s, now)
            pending.decide(decision)
