"""The books of the cluster: which requests wait and run on which tier, and on whose behalf."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from flux_ray.router.forecast import Forecast
from flux_ray.router.queue import TierQueue
from flux_ray.router.ticket import Refusal, Ticket

# A gateway speaks twice a second. One that is silent for so long is dead, and so are its clients.
SILENCE_S = 5.0


@dataclass(frozen=True)
class Offer:
    """A request as its gateway tells of it: clocks differ, so its deadline is so far from now.

    `runs_on` is the replica that it was granted before, and `cost_s` then what is left: the ledger
    may have been lost meanwhile. `is_news`: it was granted by its gateway, which is alone.
    """

    ticket_id: str
    tier: str
    cost_s: float
    deadline_in_s: float
    key: str = ""
    weight: float = 1.0
    affinity: tuple[tuple[str, float], ...] = ()
    runs_on: str | None = None
    is_news: bool = False


@dataclass(frozen=True)
class Statement:
    """What a gateway says: what came, what ended, and which replicas it can reach, by tier.

    `known`, now and then: all that it waits for or runs. What else the ledger has of it has ended,
    and what the ledger lacks it has to offer again; so neither ever has to trust a single message.
    `done`: which of the ended had what they wanted. `left_s`: what running ones still take.
    """

    offers: tuple[Offer, ...] = ()
    ended: tuple[str, ...] = ()
    replicas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    known: frozenset[str] | None = None
    done: tuple[str, ...] = ()
    left_s: tuple[tuple[str, float], ...] = ()


class Decision(NamedTuple):
    """A ticket's turn on a replica, or why it gets none."""

    ticket_id: str
    replica: str | None
    refusal: Refusal | None = None


class Heard(NamedTuple):
    """What a gateway is told at once: the known tickets that the ledger lacks, and its decisions.

    It is told of these again, in case that this never arrives. `is_alone`: no other gateway is
    known, that may want the same replica.
    """

    unknown: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()
    is_alone: bool = False


class Backlog(NamedTuple):
    """GPU seconds of a tier: waiting, left of what runs, and arrived since the ledger began."""

    waiting_s: float = 0.0
    running_s: float = 0.0
    arrived_s: float = 0.0


def ticket_of(offer: Offer, now: float) -> Ticket:
    """The offer on the ledger's clock."""
    return Ticket(
        offer.ticket_id,
        offer.tier,
        offer.cost_s,
        now + offer.deadline_in_s,
        offer.key,
        offer.weight,
        offer.affinity,
    )


@dataclass
class Account:
    """A gateway as the ledger knows it: its live tickets with their tiers, and its replicas."""

    heard_at: float
    tiers: dict[str, str] = field(default_factory=dict)
    replicas: dict[str, frozenset[str]] = field(default_factory=dict)


class Ledger:
    """One queue a tier for all gateways. Every method is told the time; nothing is written twice.

    Tickets are known by their id, so that what is said again changes nothing.
    """

    def __init__(self, new_queue: Callable[[], TierQueue]) -> None:
        self._new_queue = new_queue
        self._queues: dict[str, TierQueue] = {}
        self._accounts: dict[str, Account] = {}
        self._owner: dict[str, str] = {}
        self._arrived_s: dict[str, float] = {}
        self._decisions: dict[str, list[Decision]] = {}
        self._began_at: float | None = None

    def hear(self, gateway: str, statement: Statement, now: float) -> tuple[str, ...]:
        """Write down a statement; the tickets of `known` that nobody offered."""
        if self._began_at is None:
            self._began_at = now
        account = self._accounts.setdefault(gateway, Account(now))
        account.heard_at = now
        self._follow(account, statement, now)
        if statement.known is not None:
            for ticket_id in account.tiers.keys() - statement.known:
                self._end(ticket_id, now)
        self._see_replicas(account, statement.replicas, now)
        for offer in statement.offers:
            if offer.ticket_id not in self._owner:
                self._enter(gateway, offer, now)
        return tuple((statement.known or frozenset()) - account.tiers.keys())

    def is_alone(self, gateway: str, now: float) -> bool:
        """Whether no other gateway lives: a ledger that has just begun does not know that."""
        has_heard_all = self._began_at is not None and now - self._began_at > SILENCE_S
        return has_heard_all and self._accounts.keys() == {gateway}

    def decide(self, now: float) -> dict[str, list[Decision]]:
        """What has been decided since the last call, by gateway."""
        for queue in self._queues.values():
            grants, refused = queue.take(now)
            for ticket, replica in grants:
                self._tell(ticket.ticket_id, Decision(ticket.ticket_id, replica))
            for ticket, refusal in refused:
                self._refuse(ticket.ticket_id, refusal)
        decisions, self._decisions = self._decisions, {}
        return decisions

    def forget_silent(self, now: float) -> list[str]:
        """End what belongs to gateways that are dead: their names."""
        silent = [g for g, a in self._accounts.items() if now - a.heard_at > SILENCE_S]
        for gateway in silent:
            account = self._accounts[gateway]
            for ticket_id in list(account.tiers):
                self._end(ticket_id, now)
            del self._accounts[gateway]
            for tier in account.replicas:
                self._settle_replicas(tier, now)
        return silent

    def backlog(self, tier: str, now: float) -> Backlog:
        """What autoscaling goes by."""
        if tier not in self._queues:
            return Backlog()
        queue = self._queues[tier]
        return Backlog(queue.waiting_s(now), queue.running_s(now), self._arrived_s.get(tier, 0.0))

    def forecast(self, offer: Offer, now: float) -> Forecast:
        """What would become of a request that is not offered yet."""
        if offer.tier not in self._queues:
            return Forecast(None)
        return self._queues[offer.tier].forecast(ticket_of(offer, now), now)

    def wake_at(self) -> float:
        """When `decide` has something to decide even if nobody speaks."""
        times = (queue.wake_at() for queue in self._queues.values())
        return min((time for time in times if time is not None), default=math.inf)

    def _queue(self, tier: str) -> TierQueue:
        if tier not in self._queues:
            self._queues[tier] = self._new_queue()
        return self._queues[tier]

    def _enter(self, gateway: str, offer: Offer, now: float) -> None:
        ticket = ticket_of(offer, now)
        self._owner[ticket.ticket_id] = gateway
        self._accounts[gateway].tiers[ticket.ticket_id] = ticket.tier
        queue = self._queue(offer.tier)
        if offer.runs_on is None or offer.is_news:
            self._arrived_s[offer.tier] = self._arrived_s.get(offer.tier, 0.0) + offer.cost_s
        if offer.runs_on is None:
            refusal = queue.offer(ticket, now)
            if refusal is not None:
                self._refuse(ticket.ticket_id, refusal)
        # On a replica that is gone it will fail, and come again under another id.
        elif offer.runs_on in self._names(offer.tier):
            enter = queue.begin if offer.is_news else queue.adopt
            enter(ticket, offer.runs_on, now)

    def _refuse(self, ticket_id: str, refusal: Refusal) -> None:
        self._tell(ticket_id, Decision(ticket_id, None, refusal))
        self._strike_out(ticket_id)

    def _tell(self, ticket_id: str, decision: Decision) -> None:
        self._decisions.setdefault(self._owner[ticket_id], []).append(decision)

    def _follow(self, account: Account, statement: Statement, now: float) -> None:
        """What became of tickets that were granted."""
        for ticket_id in statement.done:
            self._finish(ticket_id, now)
        for ticket_id in statement.ended:
            self._end(ticket_id, now)
        for ticket_id, left_s in statement.left_s:
            if ticket_id in account.tiers:
                self._queues[account.tiers[ticket_id]].progress(ticket_id, left_s, now)

    def _finish(self, ticket_id: str, now: float) -> None:
        """As _end; what it took tells how far off prices are."""
        tier = self._strike_out(ticket_id)
        if tier is not None:
            self._queues[tier].finish(ticket_id, now)

    def _end(self, ticket_id: str, now: float) -> None:
        tier = self._strike_out(ticket_id)
        if tier is not None:
            self._queues[tier].cancel(ticket_id, now)

    def _strike_out(self, ticket_id: str) -> str | None:
        """Its tier, or None if it has been struck out before."""
        gateway = self._owner.pop(ticket_id, None)
        return None if gateway is None else self._accounts[gateway].tiers.pop(ticket_id)

    def _see_replicas(
        self, account: Account, replicas: Mapping[str, tuple[str, ...]], now: float
    ) -> None:
        for tier, names in replicas.items():
            if account.replicas.get(tier) != frozenset(names):
                account.replicas[tier] = frozenset(names)
                self._settle_replicas(tier, now)

    def _settle_replicas(self, tier: str, now: float) -> None:
        for ticket in self._queue(tier).set_replicas(sorted(self._names(tier)), now):
            # Its gateway notices the death itself, and offers it again under another id.
            self._strike_out(ticket.ticket_id)

    def _names(self, tier: str) -> frozenset[str]:
        """Only replicas that all gateways can reach: any of them may be granted one."""
        views = [a.replicas[tier] for a in self._accounts.values() if tier in a.replicas]
        return frozenset.intersection(*views) if views else frozenset()
