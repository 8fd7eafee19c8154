"""The values that gateways and the ledger send each other, and two small stores of them.

`Places` remembers which replicas have a request, for a client that sends it again through another
gateway. `Outbox` keeps messages until their receiver has acknowledged them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from flux_ray.request import QueuePosition
from flux_ray.router.queue import Rejection
from flux_ray.router.quotas import LimitExceeded, LimitStatus, QuotaLimits, UsageEntry, UsageRow

# A client that comes again does so within seconds; replicas keep the images no longer either.
KEPT_S = 300.0
# Some hundred bytes each, without the prompts that were upsampled, which are counted by themselves.
MAX_KEPT = 20_000
MAX_KEPT_CHARS = 16 * 2**20


@dataclass(frozen=True)
class Retry:
    """The name under which a request is found when its client sends it again.

    No other caller can say the same `name`. `fingerprint` is a digest of all that it asks for.
    `is_lasting`: it is found after it has been answered, too, else only before. `prompt`: its words
    as they were upsampled, for no LLM says the same twice; empty if they are as the caller's.
    """

    name: str
    fingerprint: str
    is_lasting: bool = True
    prompt: str = field(default="", repr=False)

    @property
    def run(self) -> str:
        """Return the replica's name for it, which no other caller or request has."""
        return f"{self.name} {self.fingerprint}"


class Place(NamedTuple):
    """A replica that was assigned a request, with its ticket, its seed and its `Retry.prompt`."""

    ticket_id: str
    tier: str
    replica: str
    fingerprint: str
    seed: int
    prompt: str = ""


class Places:
    """Remember where named requests run, and for 5 minutes where they ran. `now` is in seconds.

    A request that ended undone is forgotten at once; one that was done is kept if it is lasting.
    All requests of a gateway that fell silent are kept, since their replicas go on.
    """

    def __init__(self) -> None:
        # By name and ticket; the place that was assigned last is the last one of its name.
        self._places: dict[str, dict[str, Place]] = {}
        self._live: dict[str, Retry] = {}
        # By ticket: until when its place is kept, and its name. The first to go is the first one.
        self._kept: dict[str, tuple[float, str]] = {}
        self._num_chars = 0

    def assign(self, retry: Retry, place: Place) -> None:
        """Note that a replica has it from now on."""
        self._kept.pop(place.ticket_id, None)
        self._live[place.ticket_id] = retry
        places = self._places.setdefault(retry.name, {})
        old = places.get(place.ticket_id)
        self._num_chars += len(place.prompt) - (0 if old is None else len(old.prompt))
        places[place.ticket_id] = place

    def end(self, ticket_id: str, now: float, *, is_done: bool) -> None:
        """End a request, as its gateway reports; an unknown ticket is ignored."""
        retry = self._live.pop(ticket_id, None)
        if retry is None:
            return
        if is_done and retry.is_lasting:
            self._keep(ticket_id, retry, now)
        else:
            self._drop(ticket_id, retry.name)

    def abandon(self, ticket_ids: Iterable[str], now: float) -> None:
        """Keep the requests of a gateway that fell silent."""
        for ticket_id in ticket_ids:
            retry = self._live.pop(ticket_id, None)
            if retry is not None:
                self._keep(ticket_id, retry, now)

    def find(self, name: str, now: float) -> tuple[Place, ...]:
        """Return the places of this name, the latest first."""
        self._forget(now)
        return tuple(reversed(self._places.get(name, {}).values()))

    def _keep(self, ticket_id: str, retry: Retry, now: float) -> None:
        self._kept[ticket_id] = (now + KEPT_S, retry.name)
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._kept:
            ticket_id = next(iter(self._kept))
            until, name = self._kept[ticket_id]
            is_full = len(self._kept) > MAX_KEPT or self._num_chars > MAX_KEPT_CHARS
            if until > now and not is_full:
                return
            del self._kept[ticket_id]
            self._drop(ticket_id, name)

    def _drop(self, ticket_id: str, name: str) -> None:
        places = self._places[name]
        self._num_chars -= len(places.pop(ticket_id).prompt)
        if not places:
            del self._places[name]


Message = TypeVar("Message")


class Receipt(NamedTuple):
    """The number of the last message of an outbox that its receiver has got."""

    outbox: str = ""
    number: int = 0


class Outbox(Generic[Message]):
    """Keep messages in order until they are acknowledged: each is delivered at least once.

    A receipt for an outbox of another name (of an earlier ledger, or from before the gateway fell
    silent) acknowledges nothing here.
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
        """Drop what the receipt acknowledges; return the rest, with the receipt for it."""
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
    """A request as its gateway submits it. Clocks differ, so `deadline_in_s` is from now.

    `cost_s`: seconds of one replica. `runs_on`: the replica that an earlier ledger assigned, and
    then `cost_s` is what is left. `work` names what is to be done, the same however often it is
    asked for; `is_counted`: a ledger has heard of it. `has_deadline` and `is_job` are as in
    QueuedRequest. `retry`: its name when it is sent again, and is then generated from `seed`.
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
    """What a gateway reports: new requests, ended ones, and the replicas it can reach, by tier.

    `known`, twice a second: all tickets that wait or run; `waiting`: those of them that wait.
    `done`: the ended ones that succeeded. `left_s`: seconds that running ones still take.
    `watched`: tickets whose queue positions it wants. `cold_starts`: seconds until a replica has
    started, by tier. Reports of one gateway have rising numbers; 0 is none.
    """

    submissions: tuple[SubmitRequest, ...] = ()
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
    """Assign a replica to a ticket, or say why not: a `rejection`, or its key's `limit`."""

    ticket_id: str
    replica: str | None
    rejection: Rejection | None = None
    limit: LimitExceeded | None = None


class ReportReply(NamedTuple):
    """The answer to a report: the known tickets that the ledger lacks, and decisions.

    Decisions are in the outbox too, in case this never arrives. `positions`: of the watched tickets
    that wait. `admitted`: the tickets of this report that were let in by their keys' limits, with
    what is left of these.
    """

    unknown: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()
    positions: tuple[tuple[str, QueuePosition], ...] = ()
    admitted: tuple[tuple[str, LimitStatus | None], ...] = ()


class Backlog(NamedTuple):
    """Replica seconds of a tier: waiting, left of what runs, arrived since the ledger began.

    `is_asked_for`: a request was refused a moment ago because no replica is up. It may be work that
    has arrived before, and counts in none of the three.
    """

    waiting_s: float = 0.0
    running_s: float = 0.0
    arrived_s: float = 0.0
    is_asked_for: bool = False
