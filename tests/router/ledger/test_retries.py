"""Where a request is that comes again: as long as it can still be had there, and for its caller."""

from hypothesis import given
from hypothesis import strategies as st

from flux_ray.router.ledger import messages as retries
from flux_ray.router.ledger.ledger import SILENCE_S, Ledger
from flux_ray.router.ledger.messages import (
    KEPT_S,
    GatewayReport,
    Place,
    Places,
    Retry,
    SubmitRequest,
)
from flux_ray.router.queue.tier_queue import TierQueue

RETRY = Retry("ours", "a ring")
NUMBERED = Retry("numbered", "a ring", is_lasting=False)
HERE = {"tiny": ("here",)}


def place(ticket_id: str, retry: Retry = RETRY) -> Place:
    return Place(ticket_id, "tiny", f"replica of {ticket_id}", retry.fingerprint, seed=7)


def offer(ticket_id: str, retry: Retry | None, **fields) -> SubmitRequest:
    return SubmitRequest(ticket_id, "tiny", 30.0, 600.0, retry=retry, seed=7, **fields)


def test_it_is_found_while_it_is_generated_and_for_a_while_when_it_was_answered() -> None:
    places = Places()
    places.assign(RETRY, place("a"))
    assert places.find("ours", 1e9) == (place("a"),)
    places.end("a", 10.0, is_done=True)
    assert places.find("ours", 10.0 + KEPT_S - 1) == (place("a"),)
    assert places.find("ours", 10.0 + KEPT_S) == ()
    assert not places._places and not places._live


def test_what_was_left_or_failed_is_generated_anew() -> None:
    places = Places()
    places.assign(RETRY, place("a"))
    places.end("a", 1.0, is_done=False)
    assert places.find("ours", 1.0) == ()


def test_a_number_for_the_logs_finds_only_what_was_never_answered() -> None:
    places = Places()
    places.assign(NUMBERED, place("a", NUMBERED))
    places.end("a", 1.0, is_done=True)
    assert places.find("numbered", 1.0) == ()
    places.assign(NUMBERED, place("b", NUMBERED))
    places.abandon(["b", "never granted"], 2.0)
    assert places.find("numbered", 2.0) == (place("b", NUMBERED),)


def test_the_last_place_is_asked_first() -> None:
    places = Places()
    for ticket_id in "abc":
        places.assign(RETRY, place(ticket_id))
    places.end("b", 1.0, is_done=False)
    assert [each.ticket_id for each in places.find("ours", 1.0)] == ["c", "a"]


def test_they_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(retries, "MAX_KEPT", 3)
    places = Places()
    for number in range(10):
        retry = Retry(f"name {number}", "a ring")
        places.assign(retry, place(str(number), retry))
        places.end(str(number), float(number), is_done=True)
    found = [number for number in range(10) if places.find(f"name {number}", 10.0)]
    assert found == [7, 8, 9]
    assert len(places._places) == 3


NAMES = st.sampled_from(["ours", "theirs"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["grant", "done", "undone", "silent", "wait"]), NAMES, st.integers(0, 5)
    )
)


@given(STEPS)
def test_nobody_is_led_to_anothers_and_nothing_stays_for_ever(steps) -> None:
    places, now = Places(), 0.0
    for step, name, number in steps:
        now += 40.0 if step == "wait" else 0.0
        ticket_id = f"{name} {number}"
        if step == "grant":
            places.assign(Retry(name, ticket_id), place(ticket_id, Retry(name, ticket_id)))
        elif step == "silent":
            places.abandon([ticket_id], now)
        elif step != "wait":
            places.end(ticket_id, now, is_done=step == "done")
        for each in ("ours", "theirs"):
            assert all(found.ticket_id.startswith(each) for found in places.find(each, now))
    for ticket_id in list(places._live):
        places.end(ticket_id, now, is_done=True)
    assert places.find("ours", now + KEPT_S) == places.find("theirs", now + KEPT_S) == ()
    assert not places._places and not places._kept


def granted(ledger: Ledger, now: float) -> list[str]:
    decisions = ledger.decide(now)
    return [each.ticket_id for told in decisions.values() for each in told if each.replica]


def test_the_ledger_knows_where_the_requests_of_a_dead_gateway_are() -> None:
    ledger = Ledger(TierQueue)
    offers = (offer("first", RETRY), offer("unnamed", None))
    ledger.hear("dead", GatewayReport(offers, replicas=HERE), 0.0)
    assert ledger.places("ours", 0.0) == (), "it waits"
    assert granted(ledger, 0.0) == ["first"]
    found = (Place("first", "tiny", "here", "a ring", 7),)
    assert ledger.places("ours", 0.0) == found
    for now, forgotten in ((SILENCE_S + 1, []), (31.0, ["dead"])):
        assert ledger.forget_silent(now) == forgotten
        assert ledger.places("ours", now) == found


def test_a_gateway_that_lives_says_what_became_of_it() -> None:
    ledger = Ledger(TierQueue)
    ledger.hear("g", GatewayReport((offer("left", RETRY),), replicas=HERE), 0.0)
    ledger.decide(0.0)
    ledger.hear("g", GatewayReport(ended=("left",)), 1.0)
    assert ledger.places("ours", 1.0) == ()
    ledger.hear("g", GatewayReport((offer("answered", RETRY),)), 2.0)
    ledger.decide(2.0)
    ledger.hear("g", GatewayReport(ended=("answered",), done=("answered",)), 3.0)
    assert [each.ticket_id for each in ledger.places("ours", 3.0)] == ["answered"]


def test_a_new_ledger_hears_where_they_are() -> None:
    ledger = Ledger(TierQueue)
    statement = GatewayReport((offer("running", RETRY, runs_on="here"),), replicas=HERE)
    ledger.hear("g", statement, 0.0)
    assert [each.replica for each in ledger.places("ours", 0.0)] == ["here"]
