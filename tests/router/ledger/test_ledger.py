"""The ledger's books over real queues: said twice or never, they come out even."""

import random

import pytest

from flux_ray.request import QueuePosition
from flux_ray.router.ledger.ledger import SILENCE_S, Ledger
from flux_ray.router.ledger.messages import Decision, GatewayReport, SubmitRequest
from flux_ray.router.queue.tier_queue import TierQueue

REPLICAS = {"tiny": ("a", "b")}


def offer(
    ticket_id: str, cost_s: float = 1.0, deadline_in_s: float = 60.0, **fields
) -> SubmitRequest:
    return SubmitRequest(ticket_id, "tiny", cost_s, deadline_in_s, **fields)


def granted(decisions: list[Decision]) -> dict[str, str | None]:
    return {decision.ticket_id: decision.replica for decision in decisions}


@pytest.fixture
def ledger() -> Ledger:
    """With a gateway `g` that reaches two replicas."""
    ledger = Ledger(TierQueue)
    ledger.hear("g", GatewayReport(replicas=REPLICAS), 0.0)
    return ledger


def test_turns_come_as_replicas_are_free(ledger):
    ledger.hear("g", GatewayReport(submissions=tuple(offer(name) for name in "xyz")), 0.0)
    first = granted(ledger.decide(0.0)["g"])
    assert set(first.values()) == {"a", "b"}
    assert ledger.backlog("tiny", 0.0)[:3] == (1.0, 2.0, 3.0)
    (waiting,) = {"x", "y", "z"} - first.keys()
    done = next(iter(first))
    ledger.hear("g", GatewayReport(ended=(done,)), 0.5)
    assert granted(ledger.decide(0.5)["g"]) == {waiting: first[done]}


def test_a_refusal_goes_to_its_gateway_and_is_forgotten(ledger):
    ledger.hear("h", GatewayReport(replicas=REPLICAS), 0.0)
    ledger.hear("h", GatewayReport(submissions=(offer("x", cost_s=5, deadline_in_s=1),)), 0.0)
    decisions = ledger.decide(0.0)
    assert list(decisions) == ["h"]
    assert decisions["h"][0].rejection is not None
    assert ledger.backlog("tiny", 0.0)[:2] == (0.0, 0.0)


def test_what_is_said_twice_counts_once(ledger):
    for _ in range(2):
        ledger.hear("g", GatewayReport(submissions=(offer("x"),)), 0.0)
    assert len(ledger.decide(0.0)["g"]) == 1
    for _ in range(2):
        ledger.hear("g", GatewayReport(ended=("x", "never heard of")), 0.0)
    assert ledger.backlog("tiny", 0.0)[:3] == (0.0, 0.0, 1.0)


def test_what_a_gateway_does_not_know_any_more_has_ended(ledger):
    ledger.hear("g", GatewayReport(submissions=(offer("x"), offer("y"), offer("z"))), 0.0)
    ledger.decide(0.0)
    assert ledger.hear("g", GatewayReport(known=frozenset({"y"})), 0.1) == ()
    assert ledger.backlog("tiny", 0.1).waiting_s + ledger.backlog("tiny", 0.1).running_s <= 1.0


def test_what_the_ledger_lacks_is_asked_for(ledger):
    assert ledger.hear("g", GatewayReport(known=frozenset({"x"})), 0.0) == ("x",)


def test_after_a_loss_what_runs_is_taken_over_and_not_granted_again(ledger):
    ledger.hear(
        "g", GatewayReport(submissions=(offer("x", runs_on="a"), offer("y", runs_on="b"))), 0.0
    )
    ledger.hear("g", GatewayReport(submissions=(offer("z"),)), 0.0)
    assert ledger.decide(0.0) == {}
    assert ledger.backlog("tiny", 0.0)[:2] == (1.0, 2.0)
    ledger.hear("g", GatewayReport(ended=("x",)), 0.5)
    assert granted(ledger.decide(0.5)["g"]) == {"z": "a"}


def test_what_is_said_to_run_on_a_replica_that_is_gone_brings_it_not_back(ledger):
    ledger.hear("g", GatewayReport(submissions=(offer("x", runs_on="gone"),)), 0.0)
    ledger.hear("g", GatewayReport(submissions=(offer("y"), offer("z"), offer("w"))), 0.0)
    assert set(granted(ledger.decide(0.0)["g"]).values()) == {"a", "b"}
    ledger.hear("g", GatewayReport(ended=("x", "y", "z", "w")), 0.1)
    assert ledger.backlog("tiny", 0.1)[:2] == (0.0, 0.0)


def test_what_still_runs_is_as_long_as_its_gateway_says(ledger):
    ledger.hear("g", GatewayReport(submissions=(offer("x", 5.0), offer("y", 5.0))), 0.0)
    ledger.decide(0.0)
    ledger.hear("g", GatewayReport(left_s=(("x", 9.0), ("unknown", 3.0))), 1.0)
    ledger.hear("h", GatewayReport(replicas=REPLICAS, left_s=(("y", 90.0),)), 1.0)
    assert ledger.backlog("tiny", 1.0).running_s == pytest.approx(9.0 + 4.0), "y is g's"
    ledger.hear("g", GatewayReport(left_s=(("x", 0.5),)), 2.0)
    assert ledger.backlog("tiny", 2.0).running_s == pytest.approx(0.5 + 3.0)


def test_what_is_done_tells_how_far_off_prices_are(ledger):
    """Where all take half of their price, who has little more than that is let in."""
    hasty = [offer(f"hasty {number}", 4.0, 3.0) for number in range(2)]
    ledger.hear("g", GatewayReport(submissions=(hasty[0],)), 0.0)
    assert ledger.decide(0.0)["g"][0].rejection is not None
    for number in range(10):
        at = 10.0 * (number + 1)
        ledger.hear("g", GatewayReport(submissions=(offer(f"{number}", 4.0, 60.0),)), at)
        assert granted(ledger.decide(at)["g"])
        ledger.hear("g", GatewayReport(ended=(f"{number}",), done=(f"{number}",)), at + 2.0)
    ledger.hear("g", GatewayReport(submissions=(hasty[1],)), 200.0)
    assert granted(ledger.decide(200.0)["g"])
    assert ledger.backlog("tiny", 200.0).running_s == pytest.approx(4.0)


def test_a_gateway_that_falls_silent_leaves_nothing(ledger):
    ledger.hear("h", GatewayReport(submissions=(offer("x"), offer("y"), offer("z"))), 0.0)
    ledger.decide(0.0)
    ledger.hear("g", GatewayReport(), SILENCE_S)
    assert ledger.forget_silent(SILENCE_S + 0.1) == ["h"]
    assert ledger.backlog("tiny", SILENCE_S + 0.1)[:2] == (0.0, 0.0)


def test_what_a_silent_gateway_ran_counts_until_its_price_is_over(ledger):
    """Its replica goes on with it. What had its turn after the gateway's end was never begun."""
    ledger.hear("g", GatewayReport(submissions=(offer("mine", 2.0),)), 0.0)
    late = (offer("long", 60.0, 600.0), offer("unheard", 60.0, 600.0))
    ledger.hear("h", GatewayReport(submissions=late), 0.0)
    decisions = ledger.decide(0.0)
    replicas = granted(decisions["g"] + decisions["h"])
    ledger.hear("g", GatewayReport(ended=("mine",)), 2.0)
    assert granted(ledger.decide(2.0)["h"]) == {"unheard": replicas["mine"]}
    more = (offer("x", 70.0, 600.0), offer("y", 70.0, 600.0))
    ledger.hear("g", GatewayReport(submissions=more), 5.0)
    assert ledger.forget_silent(5.1) == []
    assert granted(ledger.decide(5.1)["g"]) == {"x": replicas["mine"]}
    ledger.hear("g", GatewayReport(), 60.0)
    assert ledger.forget_silent(60.1) == ["h"]
    assert granted(ledger.decide(60.1)["g"]) == {"y": replicas["long"]}


def test_a_gateway_that_was_silent_finds_its_requests_where_they_run(ledger):
    ledger.hear("h", GatewayReport(submissions=(offer("x", 60.0, 600.0),)), 0.0)
    ledger.decide(0.0)
    ledger.hear("g", GatewayReport(), 6.0)
    ledger.forget_silent(6.0)
    assert ledger.hear("h", GatewayReport(known=frozenset({"x"}), replicas=REPLICAS), 7.0) == ()
    assert ledger.backlog("tiny", 7.0).running_s == pytest.approx(53.0)
    ledger.hear("h", GatewayReport(ended=("x",), done=("x",)), 8.0)
    assert ledger.backlog("tiny", 8.0).running_s == 0.0


def test_the_replicas_are_those_that_serve_names_whatever_gateways_see(ledger):
    """A gateway that is new, cut off or stuck takes nothing from the others, and gives nothing."""
    ledger.see_replicas("tiny", ("b",), 0.0)
    for name, view in (("new", ()), ("stuck", ("gone",))):
        ledger.hear(name, GatewayReport(replicas={"tiny": view}), 0.0)
    ledger.hear("g", GatewayReport(submissions=(offer("x"), offer("y"))), 0.0)
    assert granted(ledger.decide(0.0)["g"]) == {"x": "b"}


def test_until_serve_was_heard_the_replicas_are_all_that_any_gateway_reaches(ledger):
    ledger.hear("h", GatewayReport(replicas={"tiny": ("b", "c")}), 0.0)
    ledger.hear("new", GatewayReport(replicas={"tiny": ()}), 0.0)
    ledger.hear("g", GatewayReport(submissions=tuple(offer(name) for name in "wxyz")), 0.0)
    assert set(granted(ledger.decide(0.0)["g"]).values()) == {"a", "b", "c"}


def test_a_replica_that_is_away_for_a_moment_comes_back_with_what_it_runs(ledger):
    ledger.see_replicas("tiny", ("a",), 0.0)
    ledger.hear(
        "g", GatewayReport(submissions=(offer("x", 30.0, 600.0), offer("y", 30.0, 600.0))), 0.0
    )
    assert granted(ledger.decide(0.0)["g"]) == {"x": "a"}
    ledger.see_replicas("tiny", (), 1.0)
    assert ledger.decide(1.0) == {}
    ledger.see_replicas("tiny", ("a",), 2.0)
    assert ledger.decide(2.0) == {}
    assert ledger.backlog("tiny", 2.0)[:3] == (30.0, 28.0, 60.0)
    ledger.hear("g", GatewayReport(ended=("x",), done=("x",)), 30.0)
    assert granted(ledger.decide(30.0)["g"]) == {"y": "a"}


def test_what_runs_where_nobody_knows_of_is_on_the_books_when_that_is_known():
    """A new ledger hears of running requests before it hears of their replicas."""
    ledger = Ledger(TierQueue)
    ledger.hear(
        "g", GatewayReport(submissions=(offer("x", 27.0, 600.0, runs_on="a"), offer("y"))), 0.0
    )
    ledger.see_replicas("tiny", ("a",), 0.5)
    assert ledger.decide(0.5) == {}
    assert ledger.backlog("tiny", 0.5).running_s == pytest.approx(26.5)


def test_the_work_of_a_replica_that_is_gone_stays_until_its_gateway_says_that_it_ended(ledger):
    ledger.hear("g", GatewayReport(submissions=(offer("x"), offer("y"))), 0.0)
    lost = next(d.ticket_id for d in ledger.decide(0.0)["g"] if d.replica == "a")
    ledger.hear("g", GatewayReport(replicas={"tiny": ("b",)}), 0.1)
    assert ledger.backlog("tiny", 0.1).running_s == pytest.approx(1.8)
    ledger.hear("g", GatewayReport(ended=(lost,)), 0.2)
    assert ledger.backlog("tiny", 0.2).running_s == pytest.approx(0.8)
    ledger.hear("g", GatewayReport(submissions=(offer("z"),)), 0.2)
    assert ledger.decide(0.2) == {}


def test_with_no_replica_requests_wait(ledger):
    ledger.hear("g", GatewayReport(replicas={"tiny": ()}), 0.0)
    ledger.hear("g", GatewayReport(submissions=(offer("x"),)), 0.0)
    assert ledger.decide(0.0) == {}
    assert ledger.backlog("tiny", 0.0).waiting_s == 1.0
    ledger.hear("g", GatewayReport(replicas=REPLICAS), 3.0)
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
            ledger.hear(gateway, GatewayReport(offers, tuple(ended), replicas, known), now)
        for owner, decisions in ledger.decide(now).items():
            for decision in decisions:
                if decision.replica is None:
                    live[owner].discard(decision.ticket_id)
    ledger.hear("g", GatewayReport(known=frozenset()), now)
    ledger.hear("g", GatewayReport(), now + SILENCE_S + 1)
    ledger.forget_silent(now + SILENCE_S + 1)
    assert ledger.backlog("tiny", now + SILENCE_S + 1)[:2] == (0.0, 0.0)


def test_what_was_granted_and_not_heard_is_told_again(ledger):
    ledger.hear("g", GatewayReport(submissions=(offer("x"),)), 0.0)
    [decision] = ledger.decide(0.0)["g"]
    beat = GatewayReport(known=frozenset({"x"}), waiting=frozenset({"x"}))
    ledger.hear("g", beat, 0.5)
    assert ledger.decide(0.5) == {"g": [decision]}
    ledger.hear("g", GatewayReport(known=frozenset({"x"})), 1.0)
    assert ledger.decide(1.0) == {}


def test_a_statement_that_is_late_or_doubled_changes_nothing(ledger):
    first = GatewayReport(submissions=(offer("x"),), number=1)
    ledger.hear("g", first, 0.0)
    ledger.decide(0.0)
    ledger.hear("g", GatewayReport(known=frozenset({"x"}), number=3), 0.2)
    ledger.hear("g", GatewayReport(known=frozenset(), number=2), 0.3)
    ledger.hear("g", first, 0.3)
    assert ledger.backlog("tiny", 0.3)[:3] == (0.0, pytest.approx(0.7), 1.0)


def test_with_no_replica_who_cannot_wait_for_one_hears_so_at_once():
    ledger = Ledger(TierQueue)
    ledger.learn_cold_start("tiny", 60.0)
    ledger.hear("g", GatewayReport(submissions=(offer("nobody knows yet", 1.0, 8.0),)), 0.0)
    assert ledger.decide(0.0) == {}
    ledger.hear("g", GatewayReport((offer("x", 1.0, 8.0),), replicas={"tiny": ()}), 0.0)
    [decision] = [each for each in ledger.decide(0.0)["g"] if each.ticket_id == "x"]
    assert decision.rejection is not None
    assert "no replica is up" in decision.rejection.reason
    assert decision.rejection.retry_after_s == pytest.approx(53.0, abs=0.01)
    ledger.hear("g", GatewayReport((offer("y", 1.0, 80.0),)), 0.0)
    assert "y" not in granted(ledger.decide(0.0).get("g", []))


def test_work_arrives_once_however_often_its_client_comes_back(ledger):
    ledger.hear(
        "g", GatewayReport(submissions=(offer("busy", 100.0, 600.0), offer("too", 100.0, 600.0))), 0
    )
    ledger.decide(0.0)
    for number in range(10):
        now = 1.0 + 5 * number
        ledger.hear(
            "g", GatewayReport(submissions=(offer(f"{number}", 10.0, 20.0, work="a cat"),)), now
        )
        assert ledger.decide(now)["g"][0].rejection is not None
    assert ledger.backlog("tiny", 50.0).arrived_s == 210.0
    ledger.hear("g", GatewayReport(submissions=(offer("other", 10.0, 20.0, work="a dog"),)), 60.0)
    assert ledger.backlog("tiny", 60.0).arrived_s == 220.0


def test_a_tier_at_rest_is_asked_for_by_work_that_has_arrived_before(ledger):
    """Its client comes back after the replica that its first try had started is gone."""
    ledger.learn_cold_start("tiny", 60.0)
    ledger.see_replicas("tiny", (), 0.0)
    for now, name in ((0.0, "first"), (400.0, "again")):
        assert not ledger.backlog("tiny", now).is_asked_for
        hasty = offer(name, 1.0, 8.0, work="a cat")
        ledger.hear("g", GatewayReport((hasty,)), now)
        assert ledger.decide(now)["g"][0].rejection is not None
        assert ledger.backlog("tiny", now + 1.0) == (0.0, 0.0, 1.0, True)
    assert not ledger.backlog("tiny", 411.0).is_asked_for


def test_work_that_is_put_back_or_tried_again_arrives_once(ledger):
    for number in range(5):
        name = f"job-{number}"
        ledger.hear("g", GatewayReport(submissions=(offer(name, 3.0, work="job"),)), number)
        assert granted(ledger.decide(number)["g"])[name] is not None
        ledger.hear("g", GatewayReport(ended=(name,)), number + 0.5)
    assert ledger.backlog("tiny", 5.0)[:3] == (0.0, 0.0, 3.0)
    for number in range(2):
        name = f"done-{number}"
        ledger.hear("g", GatewayReport(submissions=(offer(name, 3.0, work="other"),)), 10 + number)
        ledger.decide(10 + number)
        ledger.hear("g", GatewayReport(ended=(name,), done=(name,)), 10.5 + number)
    assert ledger.backlog("tiny", 12.0).arrived_s == 9.0, "two requests for the same"


def test_who_waits_hears_where(ledger):
    offers = tuple(offer(name, 2.0, 60.0, has_deadline=False) for name in "vwxyz")
    ledger.hear("g", GatewayReport(submissions=offers), 0.0)
    ledger.decide(0.0)
    at = ledger.positions("g", ("v", "x", "y", "z", "never"), 1.0)
    assert dict(at) == {
        "x": QueuePosition(0, pytest.approx(3.0)),
        "y": QueuePosition(1, pytest.approx(3.0)),
        "z": QueuePosition(2, pytest.approx(5.0)),
    }
