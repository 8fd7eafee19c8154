"""The cluster's one ledger: which requests wait and run on which tier, and what keys have left.

The protocol with gateways, which holds whatever messages are lost, late or doubled:
- Report: a gateway sends numbered reports of what came, ended and advanced; an old number is void.
- A request brings what it counts against its key's limits: over a limit, the queue hears nothing.
- Reply: it tells what is decided at once, what the limits let in, and which tickets are unknown.
- Outbox: every decision is kept, numbered, until the gateway's next receipt says it was heard.
- Loss: twice a second a report names all that its gateway knows. What the ledger has beyond that
  has ended; what the ledger lacks it asks for; what it assigned and nobody heard it tells again.
- Rejoin: a new ledger is built from such reports: running work comes with its replica, and what an
  earlier ledger's limits let in is not refused. It decides only when all gateways have reported.
- A gateway that is silent for 5 s is dead, and its requests with it; what ran by its last report
  counts for the rest of its price, for its replica goes on with it. A replica that Serve no longer
  names gets no new work; what runs there counts until its gateway says that it ended.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flux_ray.config import COLD_START_S
from flux_ray.request import QueuePosition
from flux_ray.router.ledger.arrivals import Arrivals
from flux_ray.router.ledger.messages import (
    Backlog,
    Decision,
    GatewayReport,
    Place,
    Places,
    QuotaRequest,
    SubmitRequest,
)
from flux_ray.router.queue import Forecast, QueuedRequest, Rejection, TierQueue
from flux_ray.router.quotas import LimitStatus, QuotaLedger

# A gateway reports twice a second. One that is silent for so long is dead, and its clients with it.
SILENCE_S = 5.0
# A tier counts as asked for so long after a refusal: scaling policies ask twice a second, and some
# answers may be lost.
ASKED_FOR_S = 10.0
# Queue positions are computed no more often than this, however many gateways ask: it costs a pass
# over the whole queue.
POSITIONS_S = 1.0


def queued_for(submission: SubmitRequest, now: float) -> QueuedRequest:
    """Return the queue's entry for a request: its deadline is on the ledger's clock."""
    return QueuedRequest(
        submission.ticket_id,
        submission.tier,
        submission.cost_s,
        now + submission.deadline_in_s,
        submission.key,
        submission.weight,
        submission.affinity,
        submission.has_deadline,
        submission.is_job,
    )


@dataclass
class GatewaySession:
    """A gateway as the ledger knows it: its live tickets, and the replicas that it can reach."""

    heard_at: float
    number: int = 0
    submissions: dict[str, SubmitRequest] = field(default_factory=dict)
    replicas: dict[str, frozenset[str]] = field(default_factory=dict)


class Ledger:
    """Keep one queue per tier, and the limits of keys, for all gateways.

    `LedgerActor` calls it, from its event loop only. `now` is in seconds, of a clock that nobody
    sets. Tickets are known by their id, so a message that is repeated changes nothing.
    """

    def __init__(
        self, new_queue: Callable[[], TierQueue], quotas: QuotaLedger | None = None
    ) -> None:
        self._new_queue = new_queue
        self._quotas = quotas or QuotaLedger()
        # The tickets of the last report that their keys' limits let in.
        self._admitted: list[tuple[str, QuotaRequest]] = []
        self._queues: dict[str, TierQueue] = {}
        self._sessions: dict[str, GatewaySession] = {}
        self._owner: dict[str, str] = {}
        self._arrivals = Arrivals()
        self._places = Places()
        self._decisions: dict[str, list[Decision]] = {}
        # The replicas that Serve names, by tier; none for a tier until it was heard.
        self._served: dict[str, frozenset[str]] = {}
        self._positions: dict[str, tuple[float, dict[str, QueuePosition]]] = {}
        self._cold_starts: dict[str, float] = {}
        # Tiers whose replicas somebody has named, even if there were none. For any other tier it
        # is not known whether a replica has to be started.
        self._seen: set[str] = set()

    @property
    def tiers(self) -> frozenset[str]:
        """Return the tiers that somebody has named so far."""
        return frozenset(self._queues)

    def hear(self, gateway: str, report: GatewayReport, now: float) -> tuple[str, ...]:
        """Write down a report; return the tickets that its gateway knows and the ledger lacks."""
        self._admitted = []
        session = self._sessions.setdefault(gateway, GatewaySession(now))
        session.heard_at = now
        if report.number:
            if report.number <= session.number:
                return ()
            session.number = report.number
        self._follow(session, report, now)
        for tier, cold_start_s in report.cold_starts.items():
            self.learn_cold_start(tier, cold_start_s)
        self._see_views(session, report.replicas, now)
        for submission in report.submissions:
            if submission.ticket_id not in self._owner:
                self._enter(gateway, submission, now)
            elif submission.quota is not None:
                self._admitted.append((submission.ticket_id, submission.quota))
        if report.known is None:
            return ()
        return self._reconcile(gateway, report.known, report.waiting, now)

    def admitted(self, now: float) -> tuple[tuple[str, LimitStatus | None], ...]:
        """Return the last report's tickets that were let in, with what is left to their keys."""
        return tuple(
            (ticket_id, self._quotas.standing(quota.entry.key, quota.limits, now))
            for ticket_id, quota in self._admitted
        )

    def see_replicas(self, tier: str, names: Iterable[str], now: float) -> None:
        """Replace the replicas of a tier by those that Serve names."""
        if self._served.get(tier) != frozenset(names):
            self._served[tier] = frozenset(names)
            self._settle_replicas(tier, now)

    def learn_cold_start(self, tier: str, cold_start_s: float) -> None:
        """Learn how many seconds a replica of the tier takes to start."""
        self._cold_starts[tier] = cold_start_s
        if tier in self._seen:
            self._queue(tier).learn_cold_start(cold_start_s)

    def decide(self, now: float) -> dict[str, list[Decision]]:
        """Return the decisions since the last call, by gateway."""
        for queue in self._queues.values():
            assignments, rejected = queue.take(now)
            for queued, replica in assignments:
                self._tell(queued.ticket_id, Decision(queued.ticket_id, replica))
                self._place(queued.ticket_id, replica)
            for queued, rejection in rejected:
                self._reject(queued.ticket_id, rejection, now)
        decisions, self._decisions = self._decisions, {}
        return decisions

    def forget_silent(self, now: float) -> list[str]:
        """End what dead gateways waited for or ran; return those of which nothing runs any more."""
        silent = [g for g, a in self._sessions.items() if now - a.heard_at > SILENCE_S]
        for gateway in silent:
            session = self._sessions[gateway]
            # What had its turn after the last report was never begun: nobody was there to hear.
            over = [
                ticket_id
                for ticket_id, each in session.submissions.items()
                if not self._queues[each.tier].still_runs(ticket_id, session.heard_at, now)
            ]
            self._places.abandon(over, now)
            for ticket_id in over:
                self._end(ticket_id, now)
            views, session.replicas = session.replicas, {}
            for tier in views:
                self._settle_replicas(tier, now)
            if not session.submissions:
                del self._sessions[gateway]
        return [gateway for gateway in silent if gateway not in self._sessions]

    def backlog(self, tier: str, now: float) -> Backlog:
        """Return the work of a tier, for its scaling policy."""
        if tier not in self._queues:
            return Backlog()
        queue = self._queues[tier]
        return Backlog(
            queue.waiting_s(now),
            queue.running_s(now),
            self._arrivals.total_s(tier),
            now - queue.turned_away_at <= ASKED_FOR_S,
        )

    def lengths(self, now: float) -> dict[str, tuple[int, float]]:
        """Return how many requests wait, and how many replica seconds of work, by tier."""
        return {t: (queue.num_waiting, queue.waiting_s(now)) for t, queue in self._queues.items()}

    def forecast(self, submission: SubmitRequest, now: float) -> Forecast:
        """Predict what would become of a request if it were submitted now."""
        return self._queue(submission.tier).forecast(queued_for(submission, now), now)

    def places(self, name: str, now: float) -> tuple[Place, ...]:
        """Return where the request of this name runs or ran, the latest place first."""
        return self._places.find(name, now)

    def positions(
        self, gateway: str, ticket_ids: Iterable[str], now: float
    ) -> tuple[tuple[str, QueuePosition], ...]:
        """Return the places in the queue of waiting tickets, as of a second ago at most."""
        submissions = self._sessions[gateway].submissions
        found = []
        for ticket_id in ticket_ids:
            if ticket_id in submissions:
                position = self._positions_in(submissions[ticket_id].tier, now).get(ticket_id)
                if position is not None:
                    found.append((ticket_id, position))
        return tuple(found)

    def wake_at(self) -> float:
        """Return when `decide` is to be called again even if nobody reports; inf for never."""
        times = (queue.wake_at() for queue in self._queues.values())
        return min((time for time in times if time is not None), default=math.inf)

    def _queue(self, tier: str) -> TierQueue:
        if tier not in self._queues:
            self._queues[tier] = self._new_queue()
        return self._queues[tier]

    def _enter(self, gateway: str, submission: SubmitRequest, now: float) -> None:
        queued = queued_for(submission, now)
        self._owner[queued.ticket_id] = gateway
        self._sessions[gateway].submissions[queued.ticket_id] = submission
        if not self._is_admitted(gateway, submission, now):
            return
        queue = self._queue(submission.tier)
        is_counted = submission.is_counted or submission.runs_on is not None
        is_new = self._arrivals.count(submission, now, is_counted=is_counted)
        if submission.runs_on is not None:
            queue.adopt(queued, submission.runs_on, now)
            self._place(submission.ticket_id, submission.runs_on)
            return
        rejection = queue.submit(queued, now, is_new=is_new)
        if rejection is not None:
            self._reject(queued.ticket_id, rejection, now)

    def _is_admitted(self, gateway: str, submission: SubmitRequest, now: float) -> bool:
        """Count a request against its key's limits; if it is too much, the queue hears nothing."""
        if (quota := submission.quota) is None:
            return True
        if quota.is_admitted or submission.runs_on is not None:
            self._quotas.hold(gateway, quota.entry, quota.rows, now)
        else:
            limits, rows = quota.limits, quota.rows
            denial = self._quotas.enter(gateway, quota.entry, limits, rows, now)
            if denial is not None:
                self._tell(submission.ticket_id, Decision(submission.ticket_id, None, limit=denial))
                del (
                    self._owner[submission.ticket_id],
                    self._sessions[gateway].submissions[submission.ticket_id],
                )
                return False
        self._admitted.append((submission.ticket_id, quota))
        return True

    def _place(self, ticket_id: str, replica: str) -> None:
        submission = self._sessions[self._owner[ticket_id]].submissions[ticket_id]
        if (retry := submission.retry) is not None:
            asked = (retry.fingerprint, submission.seed, retry.prompt)
            self._places.assign(retry, Place(ticket_id, submission.tier, replica, *asked))

    def _reject(self, ticket_id: str, rejection: Rejection, now: float) -> None:
        # Its client may have left after the queue had chosen it to be refused.
        if ticket_id in self._owner:
            self._tell(ticket_id, Decision(ticket_id, None, rejection))
            gateway = self._owner[ticket_id]
            submission = self._strike_out(ticket_id, now)
            # Told that it was let in, its gateway would have it pass all limits the next time.
            self._admitted = [each for each in self._admitted if each[0] != ticket_id]
            if submission is not None and submission.quota is not None:
                entry = submission.quota.entry
                self._quotas.leave(gateway, entry.request_id, entry.tier, ())

    def _tell(self, ticket_id: str, decision: Decision) -> None:
        self._decisions.setdefault(self._owner[ticket_id], []).append(decision)

    def _follow(self, session: GatewaySession, report: GatewayReport, now: float) -> None:
        """Apply what a report says of tickets that have a replica."""
        for ticket_id in report.done:
            self._finish(ticket_id, now)
        for ticket_id in report.ended:
            self._end(ticket_id, now)
        for ticket_id, left_s in report.left_s:
            if ticket_id in session.submissions:
                self._queues[session.submissions[ticket_id].tier].progress(ticket_id, left_s, now)

    def _reconcile(
        self, gateway: str, known: frozenset[str], waiting: frozenset[str], now: float
    ) -> tuple[str, ...]:
        """End what the gateway no longer knows; return the tickets that only the gateway knows."""
        session = self._sessions[gateway]
        for ticket_id in session.submissions.keys() - known:
            self._end(ticket_id, now)
        for ticket_id in waiting & session.submissions.keys():
            replica = self._queues[session.submissions[ticket_id].tier].replica_of(ticket_id)
            if replica is not None:
                self._tell(ticket_id, Decision(ticket_id, replica))
        return tuple(sorted(known - session.submissions.keys()))

    def _finish(self, ticket_id: str, now: float) -> None:
        """End a request that was done; how long it took corrects the prices."""
        submission = self._strike_out(ticket_id, now, is_done=True)
        if submission is not None:
            self._queues[submission.tier].finish(ticket_id, now)

    def _end(self, ticket_id: str, now: float) -> None:
        submission = self._strike_out(ticket_id, now)
        if submission is not None:
            self._queues[submission.tier].cancel(ticket_id, now)

    def _strike_out(
        self, ticket_id: str, now: float, *, is_done: bool = False
    ) -> SubmitRequest | None:
        """Forget a ticket; return its request, or None if it was forgotten before."""
        gateway = self._owner.pop(ticket_id, None)
        if gateway is None:
            return None
        submission = self._sessions[gateway].submissions.pop(ticket_id)
        self._places.end(ticket_id, now, is_done=is_done)
        if not is_done:
            self._arrivals.put_back(submission, now)
        return submission

    def _positions_in(self, tier: str, now: float) -> dict[str, QueuePosition]:
        at, positions = self._positions.get(tier, (-math.inf, {}))
        if now - at >= POSITIONS_S:
            positions = self._queues[tier].positions(now)
            self._positions[tier] = now, positions
        return positions

    def _see_views(
        self, session: GatewaySession, replicas: Mapping[str, tuple[str, ...]], now: float
    ) -> None:
        for tier, names in replicas.items():
            if session.replicas.get(tier) != frozenset(names):
                session.replicas[tier] = frozenset(names)
                self._settle_replicas(tier, now)

    def _settle_replicas(self, tier: str, now: float) -> None:
        queue = self._queue(tier)
        queue.learn_cold_start(self._cold_starts.get(tier, COLD_START_S))
        self._seen.add(tier)
        names = self._names(tier)
        # The work of replicas that are gone stays on the books until their gateways say that it
        # has ended: a replica that drains goes on with it.
        queue.set_replicas(names, now, draining=sorted(queue.replicas - names))

    def _names(self, tier: str) -> frozenset[str]:
        """Return Serve's replicas of a tier, or until it was heard those any gateway reaches."""
        if tier in self._served:
            return self._served[tier]
        views = (session.replicas.get(tier, frozenset()) for session in self._sessions.values())
        return frozenset().union(*views)
