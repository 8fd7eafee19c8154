"""Gateways, a ledger and replicas that lose, double and delay what they tell each other.

Everything but the network and the replicas is the cluster's own: the gateways' turn books, the
ledger with its outboxes, the queue. Times are told; a step is drawn by whoever drives the world.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from flux_ray.router.ledger.ledger import SILENCE_S, Ledger
from flux_ray.router.ledger.messages import (
    Decision,
    GatewayReport,
    Outbox,
    Receipt,
    ReportReply,
    SubmitRequest,
)
from flux_ray.router.ledger.pending import PendingRequests
from flux_ray.router.queue.tier_queue import TierQueue

BEAT_S = 0.5
TICK_S = 0.25
ANSWER_S = 2.0
TIER = "tiny"


@dataclass
class Request:
    """One that a gateway took, and what became of it there."""

    offer: SubmitRequest
    came_at: float
    heard: list[tuple[float, Decision]] = field(default_factory=list)
    # None as long as it runs or waits.
    ended_at: float | None = None
    # Or asked for again.
    is_done: bool = False

    @property
    def deadline(self) -> float:
        return self.came_at + self.offer.deadline_in_s

    @property
    def replica(self) -> str | None:
        """Where it runs."""
        is_running = self.heard and self.ended_at is None
        return self.heard[0][1].replica if is_running else None


class Gateway:
    """One gateway's session: its book, its outbox receipt, and its own view of the replicas."""

    def __init__(self, name: str, replicas: frozenset[str]) -> None:
        self.name = name
        self.book = PendingRequests()
        self.view = replicas
        self.receipt = Receipt()
        self.requests: dict[str, Request] = {}
        self.spoke_at = -BEAT_S
        # The statement that it waits to hear the answer of.
        self.awaits: int | None = None

    def ask(self, offer: SubmitRequest, now: float) -> None:
        request = Request(offer, now)
        self.requests[offer.ticket_id] = request
        self.book.ask(offer, now, lambda decision: request.heard.append((self.now, decision)))

    def at(self, now: float) -> None:
        """Keep its own deadlines, as its timers do; end what was refused."""
        self.now = now
        for ticket_id, request in self.requests.items():
            if request.ended_at is not None:
                continue
            is_refused = bool(request.heard) and request.heard[0][1].replica is None
            is_late = not request.heard and now >= request.deadline
            if is_refused or is_late:
                self.end(ticket_id, now)

    def end(self, ticket_id: str, now: float, *, is_done: bool = False) -> None:
        request = self.requests[ticket_id]
        request.ended_at, request.is_done = now, is_done
        self.book.end(ticket_id, is_done=is_done)

    def report(self, *, is_beat: bool) -> GatewayReport:
        return self.book.report(
            self.now, {TIER: tuple(sorted(self.view))}, {TIER: 20.0}, is_beat=is_beat
        )


Message = Callable[[], None]


class World:
    """Messages are on their way until somebody delivers, loses or doubles them."""

    def __init__(self, lead_s: float = 0.0) -> None:
        self.now = 0.0
        self.lead_s = lead_s
        self.replicas: frozenset[str] = frozenset({"r0", "r1"})
        self.seen = self.replicas
        self.messages: list[Message] = []
        self.is_down = False
        self.num_forgotten = 0
        self.gateways: dict[str, Gateway] = {}
        self.gone: list[Gateway] = []
        self.num_gateways = 0
        self.num_requests = 0
        self.num_ledgers = 0
        self.num_outboxes = 0
        self.replace_ledger()

    def replace_ledger(self) -> None:
        """It is lost with all that it knew."""
        self.num_ledgers += 1
        self.ledger = Ledger(lambda: TierQueue(lead_s=self.lead_s))
        self.outboxes: dict[str, Outbox[Decision]] = {}
        self.ledger.see_replicas(TIER, self.seen, self.now)

    def add_gateway(self) -> None:
        name = f"g{self.num_gateways}"
        self.num_gateways += 1
        self.gateways[name] = Gateway(name, frozenset())
        self.gateways[name].at(self.now)

    def lose_gateway(self, name: str) -> None:
        """It dies with its requests; what it said may still be on its way."""
        self.gone.append(self.gateways.pop(name))

    def ask(self, gateway: str, cost_s: float, deadline_in_s: float, **fields: object) -> str:
        ticket_id = f"t{self.num_requests}"
        self.num_requests += 1
        offer = SubmitRequest(ticket_id, TIER, cost_s, deadline_in_s, work=ticket_id, **fields)  # type: ignore[arg-type]
        self.gateways[gateway].ask(offer, self.now)
        return ticket_id

    def ask_again(self, gateway: str, offer: SubmitRequest) -> None:
        """A client comes back, by another ticket, for the same work."""
        self.num_requests += 1
        again = replace(offer, ticket_id=f"t{self.num_requests}", is_counted=False)
        self.num_requests += 1
        self.gateways[gateway].ask(again, self.now)

    def speak(self, gateway: str, *, is_beat: bool) -> None:
        """A statement is on its way, unless the answer to the last one is still waited for."""
        speaker = self.gateways[gateway]
        if speaker.awaits is not None:
            return
        statement = speaker.report(is_beat=is_beat)
        speaker.awaits, speaker.spoke_at = statement.number, self.now
        self.messages.append(lambda: self._hear(gateway, statement))

    def time_out(self, gateway: str) -> None:
        """It waits no longer for an answer."""
        speaker = self.gateways[gateway]
        if speaker.awaits is not None:
            speaker.awaits = None
            speaker.book.missed()

    def listen(self, gateway: str) -> None:
        """Ask the outbox; the answer is on its way."""
        if gateway not in self.outboxes:
            return
        heard, decisions = self.outboxes[gateway].after(self.gateways[gateway].receipt)
        if decisions:
            self.messages.append(lambda: self._deliver(gateway, heard, decisions))

    def pass_time(self, num_ticks: int) -> None:
        """Tick by tick: gateways beat and keep their deadlines, the ledger looks around."""
        for _ in range(num_ticks):
            self.now += TICK_S
            for name, gateway in self.gateways.items():
                gateway.at(self.now)
                if self.now - gateway.spoke_at >= ANSWER_S:
                    self.time_out(name)
                if self.now - gateway.spoke_at >= BEAT_S:
                    self.speak(name, is_beat=True)
                self.listen(name)
            silent = self.ledger.forget_silent(self.now)
            self.num_forgotten += len(silent)
            for name in silent:
                self.outboxes.pop(name, None)
            self._keep(self.ledger.decide(self.now))
            self.flush()

    def flush(self) -> None:
        """Deliver what is on its way, in order, where the network is up."""
        while self.messages and not self.is_down:
            self.messages.pop(0)()

    def see(self, replicas: frozenset[str]) -> None:
        """Serve tells the ledger."""
        self.seen = replicas
        self.ledger.see_replicas(TIER, replicas, self.now)

    def settle(self) -> None:
        """Nothing is lost any more: until all have beaten and heard, and the dead are forgotten."""
        self.is_down = False
        self.flush()
        for gateway in self.gateways:
            self.time_out(gateway)
        self.see(self.replicas)
        self.pass_time(int((SILENCE_S + 3 * BEAT_S) / TICK_S))
        # Not before the price of what they ran is over.
        while self.ledger._sessions.keys() - self.gateways.keys():
            self.pass_time(1)

    def running(self) -> dict[str, list[Request]]:
        """By replica, what gateways that live believe to run there."""
        by_replica: dict[str, list[Request]] = {}
        for gateway in self.gateways.values():
            for request in gateway.requests.values():
                if request.replica is not None:
                    by_replica.setdefault(request.replica, []).append(request)
        return by_replica

    def requests(self) -> list[Request]:
        everybody = [*self.gateways.values(), *self.gone]
        return [request for gateway in everybody for request in gateway.requests.values()]

    def _hear(self, gateway: str, statement: GatewayReport) -> None:
        """The ledger hears a statement, maybe late or once more; its answer is on its way."""
        unknown = self.ledger.hear(gateway, statement, self.now)
        decisions = self.ledger.decide(self.now)
        told = decisions.pop(gateway, [])
        self._keep(decisions)
        self._keep({gateway: told})
        reply = ReportReply(unknown, tuple(told))
        self.messages.append(lambda: self._answer(gateway, statement.number, reply))

    def _answer(self, gateway: str, number: int, reply: ReportReply) -> None:
        speaker = self.gateways.get(gateway)
        if speaker is not None and speaker.awaits == number:
            speaker.awaits = None
            speaker.book.heard(reply, self.now)

    def _deliver(self, gateway: str, receipt: Receipt, decisions: list[Decision]) -> None:
        listener = self.gateways.get(gateway)
        if listener is not None:
            listener.book.decide(decisions, self.now)
            listener.receipt = receipt

    def _keep(self, decisions: dict[str, list[Decision]]) -> None:
        for gateway, each in decisions.items():
            if gateway not in self.outboxes:
                self.num_outboxes += 1
                self.outboxes[gateway] = Outbox(f"outbox {self.num_outboxes}")
            self.outboxes[gateway].put(each)
