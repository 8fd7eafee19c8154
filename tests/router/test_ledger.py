"""The ledger's books over real queues: said twice or never, they come out even."""

import random

import pytest

from flux_ray.router.ledger import SILENCE_S, Decision, Ledger, Offer, Statement
from flux_ray.router.queue import TierQueue

REPLICAS = {"tiny": ("a", "b")}


def offer(ticket_id: str, cost_s: float = 1.0, deadline_in_s: float = 60.0, **fields) -> Offer:
    return Offer(ticket_id, "tiny", cost_s, deadline_in_s, **fields)


def granted(decisions: list[Decision]) -> dict[str, str | None]:
    return {decision.ticket_id: decision.replica for decision in decisions}


@pytest.fixture
def ledger() -> Ledger:
    """With a gateway `g` that reaches two replicas."""
    ledger = Ledger(TierQueue)
    ledger.hear("g", Statement(replicas=REPLICAS), 0.0)
    return ledger


def test_turns_come_as_replicas_are_free(ledger):
    ledger.hear("g", Statement(offers=tuple(offer(name) for name in "xyz")), 0.0)
    first = granted(ledger.decide(0.0)["g"])
    assert set(first.values()) == {"a", "b"}
    assert ledger.backlog("tiny", 0.0) == (1.0, 2.0, 3.0)
    (waiting,) = {"x", "y", "z"} - first.keys()
    done = next(iter(first))
    ledger.hear("g", Statement(ended=(done,)), 0.5)
    assert granted(ledger.decide(0.5)["g"]) == {waiting: first[done]}


def test_a_refusal_goes_to_its_gateway_and_is_forgotten(ledger):
    ledger.hear("h", Statement(replicas=REPLICAS), 0.0)
    ledger.hear("h", Statement(offers=(offer("x", cost_s=5, deadline_in_s=1),)), 0.0)
    decisions = ledger.decide(0.0)
    assert list(decisions) == ["h"]
    assert decisions["h"][0].refusal is not None
    assert ledger.backlog("tiny", 0.0)[:2] == (0.0, 0.0)


def test_what_is_said_twice_counts_once(ledger):
    for _ in range(2):
        ledger.hear("g", Statement(offers=(offer("x"),)), 0.0)
    assert len(ledger.decide(0.0)["g"]) == 1
    for _ in range(2):
        ledger.hear("g", Statement(ended=("x", "never heard of")), 0.0)
    assert ledger.backlog("tiny", 0.0) == (0.0, 0.0, 1.0)


def test_what_a_gateway_does_not_know_any_more_has_ended(ledger):
    ledger.hear("g", Statement(offers=(offer("x"), offer("y"), offer("z"))), 0.0)
    ledger.decide(0.0)
    assert ledger.hear("g", Statement(known=frozenset({"y"})), 0.1) == ()
    assert ledger.backlog("tiny", 0.1).waiting_s + ledger.backlog("tiny", 0.1).running_s <= 1.0


def test_what_the_ledger_lacks_is_asked_for(ledger):
    assert ledger.hear("g", Statement(known=frozenset({"x"})), 0.0) == ("x",)


def test_after_a_loss_what_runs_is_taken_over_and_not_granted_again(ledger):
    ledger.hear("g", Statement(offers=(offer("x", runs_on="a"), offer("y", runs_on="b"))), 0.0)
    ledger.hear("g", Statement(offers=(offer("z"),)), 0.0)
    assert ledger.decide(0.0) == {}
    assert ledger.backlog("tiny", 0.0)[:2] == (1.0, 2.0)
    ledger.hear("g", Statement(ended=("x",)), 0.5)
    assert granted(ledger.decide(0.5)["g"]) == {"z": "a"}


def test_what_is_said_to_run_on_a_replica_that_is_gone_brings_it_not_back(ledger):
    ledger.hear("g", Statement(offers=(offer("x", runs_on="gone"),)), 0.0)
    ledger.hear("g", Statement(offers=(offer("y"), offer("z"), offer("w"))), 0.0)
    assert set(granted(ledger.decide(0.0)["g"]).values()) == {"a", "b"}
    ledger.hear("g", Statement(ended=("x", "y", "z", "w")), 0.1)
    assert ledger.backlog("tiny", 0.1)[:2] == (0.0, 0.0)


def test_what_still_runs_is_as_long_as_its_gateway_says(ledger):
    ledger.hear("g", Statement(offers=(offer("x", 5.0), offer("y", 5.0))), 0.0)
    ledger.decide(0.0)
    ledger.hear("g", Statement(left_s=(("x", 9.0), ("unknown", 3.0))), 1.0)
    ledger.hear("h", Statement(replicas=REPLICAS, left_s=(("y", 90.0),)), 1.0)
    assert ledger.backlog("tiny", 1.0).running_s == pytest.approx(9.0 + 4.0), "y is g's"
    ledger.hear("g", Statement(left_s=(("x", 0.5),)), 2.0)
    assert ledger.backlog("tiny", 2.0).running_s == pytest.approx(0.5 + 3.0)


def test_what_is_done_tells_how_far_off_prices_are(ledger):
    """Where all take half of their price, who has little more than that is let in."""
    hasty = [offer(f"hasty {number}", 4.0, 3.0) for number in range(2)]
    ledger.hear("g", Statement(offers=(hasty[0],)), 0.0)
    assert ledger.decide(0.0)["g"][0].refusal is not None
    for number in range(10):
        at = 10.0 * (number + 1)
        ledger.hear("g", Statement(offers=(offer(f"{number}", 4.0, 60.0),)), at)
        assert granted(ledger.decide(at)["g"])
        ledger.hear("g", Statement(ended=(f"{number}",), done=(f"{number}",)), at + 2.0)
    ledger.hear("g", Statement(offers=(hasty[1],)), 200.0)
    assert granted(ledger.decide(200.0)["g"])
    assert ledger.backlog("tiny", 200.0).running_s == pytest.approx(4.0)


def test_a_gateway_that_falls_silent_leaves_nothing(ledger):
    ledger.hear("h", Statement(offers=(offer("x"), offer("y"), offer("z"))), 0.0)
    ledger.decide(0.0)
    ledger.hear("g", Statement(), SILENCE_S)
    assert ledger.forget_silent(SILENCE_S + 0.1) == ["h"]
    assert ledger.backlog("tiny", SILENCE_S + 0.1)[:2] == (0.0, 0.0)


def test_only_replicas_that_all_gateways_reach_are_granted(ledger):
    ledger.hear("h", Statement(replicas={"tiny": ("b", "c")}), 0.0)
    ledger.hear("g", Statement(offers=(offer("x"), offer("y"))), 0.0)
    assert granted(ledger.decide(0.0)["g"]) == {"x": "b"}


def test_the_work_of_a_replica_that_is_gone_is_struck_out(ledger):
    ledger.hear("g", Statement(offers=(offer("x"), offer("y"))), 0.0)
    lost = next(d.ticket_id for d in ledger.decide(0.0)["g"] if d.replica == "a")
    ledger.hear("g", Statement(replicas={"tiny": ("b",)}), 0.1)
    assert ledger.backlog("tiny", 0.1).running_s == pytest.approx(0.9)
    ledger.hear("g", Statement(ended=(lost,)), 0.2)
    assert ledger.backlog("tiny", 0.2).running_s == pytest.approx(0.8)


def test_with_no_replica_requests_wait(ledger):
    ledger.hear("g", Statement(replicas={"tiny": ()}), 0.0)
    ledger.hear("g", Statement(offers=(offer("x"),)), 0.0)
    assert ledger.decide(0.0) == {}
    assert ledger.backlog("tiny", 0.0).waiting_s == 1.0
    ledger.hear("g", Statement(replicas=REPLICAS), 3.0)
    assert set(granted(ledger.decide(3.0)["g"])) == {"x"}


@pytest.mark.parametrize("seed", range(20))
def test_after_any_run_the_books_are_at_zero(seed):
    """Accept, finish, cancel, crash, losses of replicas, and of single messages."""
    dice = random.Random(seed)
    ledger, now, live = Ledger(TierQueue), 0.0, {"g": set(), "h": set()}
    for number in range(300):
        now += dice.random() * 0.2
        gateway = dice.choice(["g", "h"])
        mine = live[gateway]
        replicas = {"tiny": tuple(dice.sample("abcd", dice.randint(0, 4)))}
        ended = {t for t in mine if dice.random() < 0.3}
        mine -= ended
        offers = tuple(
            offer(f"{number}.{i}", dice.uniform(0.1, 2), dice.uniform(0.1, 20)) for i in range(2)
        )
        mine |= {each.ticket_id for each in offers}
        if dice.random() < 0.8:
            known = frozenset(mine) if dice.random() < 0.3 else None
            ledger.hear(gateway, Statement(offers, tuple(ended), replicas, known), now)
        for owner, decisions in ledger.decide(now).items():
            for decision in decisions:
                if decision.replica is None:
                    live[owner].discard(decision.ticket_id)
    ledger.hear("g", Statement(known=frozenset()), now)
    ledger.hear("g", Statement(), now + SILENCE_S + 1)
    ledger.forget_silent(now + SILENCE_S + 1)
    assert ledger.backlog("tiny", now + SILENCE_S + 1)[:2] == (0.0, 0.0)


def test_what_began_by_itself_is_booked_as_if_it_had_been_granted(ledger):
    begun = offer("x", runs_on="a", is_news=True)
    ledger.hear("g", Statement(offers=(begun, begun)), 0.0)
    assert ledger.decide(0.0) == {}
    assert ledger.backlog("tiny", 0.0) == (0.0, 1.0, 1.0)
    ledger.hear("g", Statement(offers=(offer("y"), offer("z"))), 0.0)
    assert granted(ledger.decide(0.0)["g"]) == {"y": "b"}
    ledger.hear("g", Statement(ended=("x",)), 0.5)
    assert granted(ledger.decide(0.5)["g"]) == {"z": "a"}


def test_two_that_began_on_one_replica_come_one_after_the_other(ledger):
    """Two gateways, each of which was alone a moment ago."""
    for gateway, name in (("g", "x"), ("h", "y")):
        begun = offer(name, runs_on="a", is_news=True)
        ledger.hear(gateway, Statement(offers=(begun,), replicas=REPLICAS), 0.0)
    assert ledger.backlog("tiny", 0.0) == (0.0, 2.0, 2.0)
    for gateway, name in (("g", "x"), ("h", "y")):
        ledger.hear(gateway, Statement(ended=(name,)), 1.0)
    assert ledger.backlog("tiny", 1.0)[:2] == (0.0, 0.0)


def test_a_gateway_is_alone_where_no_other_was_heard_of_for_a_while(ledger):
    assert not ledger.is_alone("g", SILENCE_S)
    assert ledger.is_alone("g", SILENCE_S + 0.1)
    assert not ledger.is_alone("h", SILENCE_S + 0.1)
    ledger.hear("g", Statement(), SILENCE_S)
    ledger.hear("h", Statement(), SILENCE_S)
    assert not ledger.is_alone("g", SILENCE_S + 0.1)
    ledger.hear("g", Statement(), 2 * SILENCE_S)
    ledger.forget_silent(2 * SILENCE_S + 0.1)
    assert ledger.is_alone("g", 2 * SILENCE_S + 0.1)
