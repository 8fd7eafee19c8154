"""What must hold of the ledger whatever is lost, doubled, late, replaced or seen differently."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.router.ledger.world import TICK_S, TIER, Request, World

Step = tuple[Any, ...]
small = st.integers(0, 7)
costs = st.sampled_from([0.25, 1.0, 3.0, 20.0])
deadlines = st.sampled_from([1.0, 5.0, 30.0, 600.0])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), small, costs, deadlines, st.booleans(), st.booleans()),
        st.tuples(st.just("ask"), small, costs, deadlines, st.booleans(), st.booleans()),
        st.tuples(st.just("retry"), small),
        st.tuples(st.just("end"), small, st.booleans()),
        st.tuples(st.just("end"), small, st.booleans()),
        st.tuples(st.just("speak"), small, st.booleans()),
        st.tuples(st.just("time_out"), small),
        st.tuples(st.just("pass_time"), st.sampled_from([1, 2, 5, 24])),
        st.tuples(st.just("network"), st.booleans()),
        st.tuples(st.sampled_from(["deliver", "lose", "double"]), small),
        st.tuples(st.just("view"), small, small),
        st.tuples(st.just("serve_lapses"), small),
        st.tuples(st.sampled_from(["replica_dies", "replica_starts"]), small),
        st.tuples(st.sampled_from(["gateway_dies", "gateway_starts", "ledger_dies"]), small),
    ),
    min_size=10,
    max_size=50,
)


class Script:
    """A world in which one step after the other happens."""

    def __init__(self, steps: list[Step], num_gateways: int = 2) -> None:
        self.world = World()
        self.num_replicas = 2
        for _ in range(num_gateways):
            self.world.add_gateway()
        for name, *args in steps:
            getattr(self, name)(*args)
            self.world.flush()
            self.check()

    def check(self) -> None:
        """Holds after every step."""
        for request in self.world.requests():
            assert len(request.heard) <= 1, "acted on twice"
            if request.ended_at is not None and not request.heard:
                assert request.ended_at <= request.deadline + TICK_S, "refused too late"
            for heard_at, _ in request.heard:
                assert heard_at <= request.deadline + TICK_S, "heard too late"
        if self.world.num_ledgers == 1 and not self.world.num_forgotten:
            for replica, running in self.world.running().items():
                assert len(running) == 1, f"{replica} was granted twice"

    def ask(
        self, gateway: int, cost_s: float, deadline_s: float, has_deadline: bool, is_job: bool
    ) -> None:
        name = self.pick(sorted(self.world.gateways), gateway)
        if name is not None:
            self.world.ask(
                name, cost_s, deadline_s, has_deadline=has_deadline, is_job=is_job, key="k"
            )
            self.world.speak(name, is_beat=False)

    def retry(self, number: int) -> None:
        """The same work is asked for again, of the same gateway, after it was not done."""
        undone = [
            (gateway, request)
            for gateway in self.world.gateways.values()
            for request in gateway.requests.values()
            if request.ended_at is not None and not request.is_done
        ]
        picked = self.pick(undone, number)
        if picked is not None:
            gateway, request = picked
            request.is_done = True
            self.world.ask_again(gateway.name, request.offer)

    def end(self, number: int, is_done: bool) -> None:
        """A client leaves, or has what it wanted if it had its turn."""
        live = [
            (gateway, request)
            for gateway in self.world.gateways.values()
            for request in gateway.requests.values()
            if request.ended_at is None
        ]
        picked = self.pick(live, number)
        if picked is not None:
            gateway, request = picked
            gateway.end(
                request.offer.ticket_id, self.world.now, is_done=is_done and bool(request.heard)
            )

    def speak(self, gateway: int, is_beat: bool) -> None:
        self.on_gateway(gateway, lambda name: self.world.speak(name, is_beat=is_beat))

    def time_out(self, gateway: int) -> None:
        self.on_gateway(gateway, self.world.time_out)

    def pass_time(self, num_ticks: int) -> None:
        self.world.pass_time(num_ticks)

    def network(self, is_down: bool) -> None:
        self.world.is_down = is_down

    def deliver(self, number: int) -> None:
        """Before what was sent earlier."""
        if self.world.messages:
            self.world.messages.pop(number % len(self.world.messages))()

    def lose(self, number: int) -> None:
        if self.world.messages:
            self.world.messages.pop(number % len(self.world.messages))

    def double(self, number: int) -> None:
        if self.world.messages:
            self.world.messages.append(self.world.messages[number % len(self.world.messages)])

    def view(self, gateway: int, mask: int) -> None:
        """What a gateway sees: some of the replicas, and maybe one that never was."""
        seen = {name for bit, name in enumerate(sorted(self.world.replicas)) if mask >> bit & 1}
        seen |= {"never was"} if mask & 4 else set()

        def look(name: str) -> None:
            self.world.gateways[name].view = frozenset(seen)

        self.on_gateway(gateway, look)

    def serve_lapses(self, mask: int) -> None:
        """Serve's own word lacks some of the replicas for a while."""
        kept = {name for bit, name in enumerate(sorted(self.world.replicas)) if mask >> bit & 1}
        self.world.see(frozenset(kept))

    def replica_dies(self, number: int) -> None:
        """Its requests fail, where their gateways live; Serve notices."""
        dead = self.pick(sorted(self.world.replicas), number)
        if dead is None:
            return
        self.world.replicas -= {dead}
        for gateway in self.world.gateways.values():
            for ticket_id, request in gateway.requests.items():
                if request.replica == dead:
                    gateway.end(ticket_id, self.world.now)
        self.world.see(self.world.replicas)

    def replica_starts(self, number: int) -> None:
        self.world.replicas |= {f"r{self.num_replicas}"}
        self.num_replicas += 1
        self.world.see(self.world.replicas)

    def gateway_starts(self, number: int) -> None:
        if len(self.world.gateways) < 4:
            self.world.add_gateway()

    def gateway_dies(self, number: int) -> None:
        self.on_gateway(number, self.world.lose_gateway)

    def ledger_dies(self, number: int) -> None:
        self.world.replace_ledger()

    def on_gateway(self, number: int, do: Callable[[str], None]) -> None:
        name = self.pick(sorted(self.world.gateways), number)
        if name is not None:
            do(name)

    @staticmethod
    def pick(those: list[Any], number: int) -> Any:
        return those[number % len(those)] if those else None


def books_agree(world: World) -> None:
    """Gateways and ledger believe the same of every request, once they have spoken."""
    queue = world.ledger._queue(TIER)
    live: list[Request] = []
    for name, gateway in world.gateways.items():
        mine = {key: each for key, each in gateway.requests.items() if each.ended_at is None}
        account = world.ledger._sessions.get(name)
        assert (account.submissions.keys() if account else set()) == mine.keys()
        for ticket_id, request in mine.items():
            assert queue.replica_of(ticket_id) == request.replica
        live += mine.values()
    if any(request.replica is None for request in live):
        busy = {request.replica for request in live}
        assert world.replicas <= busy, "who waits, waits for a replica that is free"


def work_is_counted_once(world: World) -> None:
    if world.num_ledgers > 1:
        return
    arrived_s = world.ledger.backlog(TIER, world.now).arrived_s
    works = {request.offer.work: request.offer.cost_s for request in world.requests()}
    heard = {each.offer.work: each.offer.cost_s for each in world.requests() if each.heard}
    assert sum(heard.values()) - 1e-6 <= arrived_s <= sum(works.values()) + 1e-6


def all_ends(world: World) -> None:
    for gateway in world.gateways.values():
        for ticket_id, request in gateway.requests.items():
            if request.ended_at is None:
                gateway.end(ticket_id, world.now)
    world.settle()
    assert world.ledger.backlog(TIER, world.now)[:2] == (0.0, 0.0)


def whatever_happens(steps: list[Step]) -> None:
    script = Script(steps)
    script.world.settle()
    script.check()
    books_agree(script.world)
    work_is_counted_once(script.world)
    all_ends(script.world)


any_script = given(STEPS)
quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@settings(max_examples=100, deadline=None, suppress_health_check=quiet)
@any_script
def test_the_books_come_out_even_whatever_happens(steps: list[Step]) -> None:
    whatever_happens(steps)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=quiet)
@any_script
def test_the_books_come_out_even_whatever_happens_at_length(steps: list[Step]) -> None:
    whatever_happens(steps)
