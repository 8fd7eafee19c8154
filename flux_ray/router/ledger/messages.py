"""What gateways and the ledger tell each other.

Where requests that may come again are drawn, or were a while ago: a gateway may die under them.

Its client or a balancer sends the request again, to any gateway, which asks here who has it.

What a gateway is told, kept until it says that it has heard it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from flux_ray.request import QueuePosition
from flux_ray.router.queue.entry import Rejection
from flux_ray.router.quotas import LimitExceeded, LimitStatus, QuotaLimits, UsageEntry, UsageRow

# A client that comes again does so within seconds; replicas keep the images no longer either.
KEPT_S = 300.0
# Some hundred bytes each.
MAX_KEPT = 20_000


@dataclass(frozen=True)
class Retry:
    """By what a request is known when it comes again: a name that no other caller can say.

    `fingerprint`: of all that it asks for. `is_lasting`: its images are the same once it has been
    answered, too; else only what was never answered is found.
    """

    name: str
    fingerprint: str
    is_lasting: bool = True

    @property
    def run(self) -> str:
        """What a replica calls it: never the same for another caller or another request."""
        return f"{self.name} {self.fingerprint}"


class Place(NamedTuple):
    """A replica that was granted a request, by which ticket, and with which seed."""

    ticket_id: str
    tier: str
    replica: str
    fingerprint: str
    seed: int


class Places:
    """By name, where requests are. Every method is told the time.

    A request that its gateway ended undone is found no more. One that was done is if it is lasting,
    and one of a gateway that fell silent is in any case: its replica goes on drawing.
    """

    def __init__(self) -> None:
        # The last that was granted is the last.
        self._places: dict[str, dict[str, Place]] = {}
        self._live: dict[str, Retry] = {}
        # Until when, by ticket; in that order.
        self._kept: dict[str, tuple[float, str]] = {}

    def grant(self, retry: Retry, place: Place) -> None:
        """A replica draws it from now on."""
        self._kept.pop(place.ticket_id, None)
        self._live[place.ticket_id] = retry
        self._places.setdefault(retry.name, {})[place.ticket_id] = place

    def end(self, ticket_id: str, now: float, *, is_done: bool) -> None:
        """Its gateway says that it is over; unknown ones are ignored."""
        retry = self._live.pop(ticket_id, None)
        if retry is None:
            return
        if is_done and retry.is_lasting:
            self._keep(ticket_id, retry, now)
        else:
            self._drop(ticket_id, retry.name)

    def abandon(self, ticket_ids: Iterable[str], now: float) -> None:
        """Their gateway is silent: nobody hears what becomes of them."""
        for ticket_id in ticket_ids:
            retry = self._live.pop(ticket_id, None)
            if retry is not None:
                self._keep(ticket_id, retry, now)

    def find(self, name: str, now: float) -> tuple[Place, ...]:
        """Where it may be, the latest first."""
        self._forget(now)
        return tuple(reversed(self._places.get(name, {}).values()))

    def _keep(self, ticket_id: str, retry: Retry, now: float) -> None:
        self._kept[ticket_id] = (now + KEPT_S, retry.name)
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._kept:
            ticket_id = next(iter(self._kept))
            until, name = self._kept[ticket_id]
            if until > now and len(self._kept) <= MAX_KEPT:
                return
            del self._kept[ticket_id]
            self._drop(ticket_id, name)

    def _drop(self, ticket_id: str, name: str) -> None:
        places = self._places[name]
        del places[ticket_id]
        if not places:
            del self._places[name]


Message = TypeVar("Message")


class Receipt(NamedTuple):
    """Up to which message of which outbox everything was heard."""

    outbox: str = ""
    number: int = 0


class Outbox(Generic[Message]):
    """Messages in order, each told at least once.

    A receipt for another outbox, of a ledger before this one or of the same gateway before it fell
    silent, says nothing of what is in here.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._messages: list[tuple[int, Message]] = []
        self._last = 0

    def put(self, messages: list[Message]) -> None:
        """Add them at the end."""
        for message in messages:
            self._last += 1
            self._messages.append((self._last, message))

    def after(self, receipt: Receipt) -> tuple[Receipt, list[Message]]:
        """What is left after a receipt; and the receipt for that."""
        if receipt.outbox == self._name:
            self._messages = [each for each in self._messages if each[0] > receipt.number]
        return Receipt(self._name, self._last), [message for _, message in self._messages]


@dataclass(frozen=True)
class QuotaRequest:
    """A request to be counted against its key's limits, with what its gateway knows of the day.

    `is_admitted`: a ledger has let it in before, so it is written down and not refused any more.
    """

    entry: UsageEntry
    limits: QuotaLimits
    rows: tuple[UsageRow, ...] = ()
    is_admitted: bool = False


@dataclass(frozen=True)
class UsageReport:
    """All requests that a gateway has in hand, and what it knows of the day.

    `rows` are all that it knows if `tells_all`, else only what is new since its last report.
    """

    entries: tuple[UsageEntry, ...]
    rows: tuple[UsageRow, ...]
    tells_all: bool


@dataclass(frozen=True)
class SubmitRequest:
    """A request as its gateway tells of it: clocks differ, so its deadline is so far from now.

    `runs_on` is the replica that it was granted before, and `cost_s` then what is left: the ledger
    may have been lost meanwhile. `work` names what is to be done, the same however often it is
    asked for; `is_counted`: a ledger has heard of it. `has_deadline` and `is_job` are as a
    ticket's. `retry`: by what it is known when it comes again, and is then drawn from `seed`.
    `quota`: what it counts against its key's limits before it may enter the queue; None if the key
    has no limits.
    """

    ticket_id: str
    tier: str
    cost_s: float
    deadline_in_s: float
    key: str = ""
    weight: float = 1.0
    affinity: tuple[tuple[str, float], ...] = ()
    runs_on: str | None = None
    has_deadline: bool = True
    is_job: bool = False
    work: str = ""
    is_counted: bool = False
    retry: Retry | None = None
    seed: int = 0
    quota: QuotaRequest | None = None


@dataclass(frozen=True)
class GatewayReport:
    """What a gateway says: what came, what ended, and which replicas it can reach, by tier.

    `known`, now and then: all that it waits for or runs; `waiting` are those of them that wait.
    `done`: which of the ended had what they wanted. `left_s`: what running ones still take.
    `watched`: whose positions it wants to hear. `cold_starts`: what a replica takes to start, by
    tier. Statements of one gateway have rising numbers; 0 is none.
    """

    offers: tuple[SubmitRequest, ...] = ()
    ended: tuple[str, ...] = ()
    replicas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    known: frozenset[str] | None = None
    done: tuple[str, ...] = ()
    left_s: tuple[tuple[str, float], ...] = ()
    waiting: frozenset[str] = frozenset()
    watched: tuple[str, ...] = ()
    cold_starts: Mapping[str, float] = field(default_factory=dict)
    number: int = 0


class Decision(NamedTuple):
    """Assign a replica to a ticket; or say why not: the queue's `refusal`, or its key's `limit`."""

    ticket_id: str
    replica: str | None
    refusal: Rejection | None = None
    limit: LimitExceeded | None = None


class ReportReply(NamedTuple):
    """What a gateway is told at once: the known tickets that the ledger lacks, and its decisions.

    It is told of these again, in case that this never arrives. `positions`: of the watched tickets
    that wait. `admitted`: the tickets of this report that were let in by their keys' limits, with
    what is left of these.
    """

    unknown: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()
    positions: tuple[tuple[str, QueuePosition], ...] = ()
    admitted: tuple[tuple[str, LimitStatus | None], ...] = ()


class Backlog(NamedTuple):
    """GPU seconds of a tier: waiting, left of what runs, and arrived since the ledger began."""

    waiting_s: float = 0.0
    running_s: float = 0.0
    arrived_s: float = 0.0
