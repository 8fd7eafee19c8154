"""What keys may have, counted over all gateways, in told time."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ray.router.quotas import (
    DAY_S,
    SILENCE_S,
    QuotaLedger,
    QuotaLimits,
    Usage,
    UsageEntry,
    Use,
)
from flux_ray.router.quotas.quota_ledger import GatewayUsage

NOON = 20_000.5 * DAY_S


def entry(request_id, key="alice", gpu_seconds=1.0, megapixels=1.0, tier="tiny", cost_s=1.0):
    return UsageEntry(request_id, tier, key, Use(gpu_seconds, megapixels), cost_s)


class Told:
    """Allowances with one allowance, told seconds after noon."""

    def __init__(self, **allowance):
        self.allowance = QuotaLimits(**allowance)
        self.date = NOON
        self.books = self.new_books()
        self.usages = {}

    def new_books(self):
        return QuotaLedger(lambda: self.date)

    def enter(self, request_id, now=0.0, gateway="g", **fields):
        self.date = NOON + now
        rows = self.usage(gateway).rows()
        asked = entry(request_id, **fields)
        return self.books.enter(gateway, asked, self.allowance, rows, NOON + now)

    def standing(self, now=0.0, key="alice"):
        self.date = NOON + now
        return self.books.standing(key, self.allowance, NOON + now)

    def leave(self, request_id, use=None, now=0.0, gateway="g", key="alice", tier="tiny"):
        usage = self.usage(gateway)
        usage.add(gateway, key, use or Use(), NOON + now)
        self.books.leave(gateway, request_id, tier, usage.rows_of(key))

    def share(self, *entries, now=0.0, gateway="g"):
        self.date = NOON + now
        usage = self.usage(gateway)
        usage.merge(self.books.share(gateway, entries, usage.rows(), NOON + now).rows)

    def usage(self, gateway):
        return self.usages.setdefault(gateway, Usage())


def test_without_limits_nothing_is_denied():
    told = Told()
    assert [told.enter(str(number)) for number in range(1000)] == [None] * 1000


def test_so_many_at_once_through_whichever_gateway():
    told = Told(max_concurrent=2)
    assert told.enter("x", gateway="g") is None
    assert told.enter("y", gateway="h") is None
    denial = told.enter("z", gateway="h")
    assert (denial.reason, denial.limit) == ("this key may have 2 requests at once", 2)
    assert told.enter("z", key="bob") is None, "others have their own"
    told.leave("x", gateway="g")
    assert told.enter("z", gateway="h") is None


def test_a_request_on_two_tiers_is_one():
    told = Told(max_concurrent=1, requests_per_minute=1, gpu_seconds_per_day=3)
    assert told.enter("x", tier="tiny") is None
    assert told.enter("x", tier="tiny-tp2") is None
    assert told.enter("x", tier="dev", gpu_seconds=2).is_daily, "but both take their seconds"
    assert told.enter("y") is not None


def test_who_waits_for_a_place_hears_when_one_is_free_by_its_price():
    told = Told(max_concurrent=2)
    told.enter("x", cost_s=10.0)
    told.enter("y", cost_s=3.0)
    assert told.enter("z", now=1.0).retry_after_s == pytest.approx(2.0)


def test_no_60_seconds_have_more_requests_than_a_minute_may():
    told = Told(requests_per_minute=3)
    assert [told.enter(name, now) for name, now in (("a", 0), ("b", 50), ("c", 55))] == [None] * 3
    denial = told.enter("d", 59.0)
    assert denial.retry_after_s == pytest.approx(1.0)
    assert told.enter("d", 59.0 + denial.retry_after_s) is None
    assert told.enter("e", 61.0).retry_after_s == pytest.approx(49.0)
    assert told.enter("f", 61.0, key="bob") is None


def test_the_limit_that_was_lowered_counts():
    told = Told(requests_per_minute=10)
    for number in range(10):
        told.enter(str(number), number)
    told.allowance = QuotaLimits(requests_per_minute=2)
    assert told.enter("x", 10.0).retry_after_s == pytest.approx(58.0)
    assert told.enter("x", 68.0) is None


def test_a_request_that_was_denied_is_not_counted():
    told = Told(requests_per_minute=1, max_concurrent=1)
    told.enter("x")
    for number in range(5):
        assert told.enter(f"y{number}", 1.0) is not None
    told.leave("x")
    assert told.enter("z", 60.0) is None


@pytest.mark.parametrize(
    ("limits", "fields"),
    [
        ({"gpu_seconds_per_day": 10}, {"gpu_seconds": 4.0}),
        ({"megapixels_per_day": 10}, {"megapixels": 4.0}),
    ],
)
def test_a_day_has_so_much(limits, fields):
    told = Told(**limits)
    assert told.enter("x", gateway="g", **fields) is None
    assert told.enter("y", gateway="h", **fields) is None
    denial = told.enter("z", now=5.0, **fields)
    assert denial.is_daily
    assert denial.retry_after_s == pytest.approx(DAY_S / 2 - 5)
    assert (denial.limit, denial.left) == (10, 2)
    told.leave("x", Use(1.0, 1.0), gateway="g")
    assert told.enter("z", **fields) is None, "what it took counts, not what it was priced"


def test_the_next_day_begins_anew():
    told = Told(gpu_seconds_per_day=10)
    told.enter("x", gpu_seconds=9.0)
    told.leave("x", Use(9.0))
    wait_s = told.enter("y", gpu_seconds=2.0).retry_after_s
    assert told.enter("y", now=wait_s, gpu_seconds=2.0) is None


def test_what_is_more_than_a_day_has_is_of_no_use_to_ask_again():
    told = Told(gpu_seconds_per_day=10)
    assert math.isinf(told.enter("x", gpu_seconds=11.0).retry_after_s)


def test_what_is_said_twice_counts_once():
    """An answer was lost, and the gateway asks again."""
    told = Told(max_concurrent=1, requests_per_minute=1, gpu_seconds_per_day=1.5)
    assert [told.enter("x") for _ in range(3)] == [None] * 3
    told.leave("x")
    told.leave("x")
    told.leave("never")


def test_a_dead_gateway_keeps_no_place():
    told = Told(max_concurrent=1)
    told.enter("x", gateway="g")
    told.share(entry("x"), now=SILENCE_S, gateway="g")
    assert told.enter("y", now=2 * SILENCE_S, gateway="h") is not None
    assert told.enter("y", now=2 * SILENCE_S + 0.1, gateway="h") is None
    told.share(now=2 * SILENCE_S + 0.2, gateway="h")


def test_a_lost_ledger_is_told_what_is_in_hand_and_what_the_day_took():
    told = Told(max_concurrent=2, gpu_seconds_per_day=20)
    told.enter("x", gateway="g", gpu_seconds=9.0)
    told.leave("x", Use(9.0), gateway="g")
    told.share(gateway="g")
    told.share(gateway="h")
    told.enter("y", gateway="g", gpu_seconds=4.0)
    told.books = told.new_books()
    assert told.enter("z", gateway="h", gpu_seconds=11.5).is_daily, "told with the request itself"
    told.share(entry("y", gpu_seconds=4.0), gateway="g")
    denial = told.enter("z", gateway="h", gpu_seconds=8.0)
    assert denial.is_daily and denial.left == pytest.approx(7.0)
    assert told.enter("z", gateway="h", gpu_seconds=7.0) is None
    assert told.enter("w", gateway="h", gpu_seconds=0.0).limit == 2


def test_an_end_that_was_not_heard_is_heard_later():
    told = Told(max_concurrent=1)
    told.enter("x")
    told.share(entry("x"))
    assert told.enter("y") is not None
    told.share()
    assert told.enter("y") is None


def test_nothing_is_kept_of_keys_that_are_gone():
    told = Told(max_concurrent=5, requests_per_minute=5)
    for number in range(100):
        told.enter(str(number), key=f"key {number}")
        told.leave(str(number), Use(1.0), key=f"key {number}")
    assert len(told.books._recent) == 100
    told.share(now=61.0)
    assert len(told.books._recent) == 0
    told.date = NOON + 3 * DAY_S
    told.books.share("g", (), (), NOON + 3 * DAY_S)
    assert told.books._usage.rows() == ()


def test_only_what_is_new_is_told():
    told = Told(max_concurrent=5)
    for gateway in "gh":
        shared = told.books.share(gateway, (), (), NOON, tells_all=True)
        assert shared == ((), False)
    told.enter("x", gateway="g")
    told.leave("x", Use(2.0), gateway="g")
    (row,) = told.usage("g").rows()
    assert told.books.share("h", (), (), NOON, tells_all=False) == ((row,), False)
    assert told.books.share("h", (), (), NOON, tells_all=False) == ((), False), "once"
    assert told.books.share("g", (), (), NOON, tells_all=False) == ((), False), "not of itself"
    assert told.books.share("h", (), (), NOON, tells_all=True) == ((row,), False)


def test_a_new_ledger_asks_for_all():
    books = QuotaLedger()
    assert books.share("g", (), (), NOON, tells_all=False).tell_all
    assert books.share("g", (), (), NOON, tells_all=False).tell_all, "until it is told"
    assert not books.share("g", (), (), NOON, tells_all=True).tell_all


@pytest.mark.parametrize("seed", range(5))
def test_no_limit_is_ever_passed(seed):
    """At random over three gateways and three keys, every limit holds at every moment."""
    rng = random.Random(seed)
    told = Told(max_concurrent=3, requests_per_minute=20, gpu_seconds_per_day=20)
    now, running, came, spent = 0.0, {}, [], Counter()
    for number in range(400):
        now += rng.expovariate(2.0)
        key, gateway = rng.choice("abc"), rng.choice("ghi")
        if rng.random() < 0.5:
            cost = rng.uniform(0.1, 2.0)
            if told.enter(str(number), now, gateway, key=key, gpu_seconds=cost) is None:
                running[str(number)] = (key, gateway, cost)
                came.append((now, key))
        elif running:
            name = rng.choice(sorted(running))
            key, gateway, cost = running.pop(name)
            took = cost * rng.random()
            spent[key] += took
            told.leave(name, Use(took), now, gateway, key)
        for gateway in "ghi":
            told.share(
                *(entry(n, k, c) for n, (k, g, c) in running.items() if g == gateway),
                now=now,
                gateway=gateway,
            )
        for key in "abc":
            mine = [cost for each, _, cost in running.values() if each == key]
            assert len(mine) <= 3
            assert sum(1 for at, each in came if each == key and at > now - 60) <= 20
            assert spent[key] + sum(mine) <= 20 + 1e-6
    assert max(spent.values()) > 10, "and they were reached"


def test_how_a_key_stands_in_its_minute():
    told = Told(requests_per_minute=3)
    assert told.standing() == (3, 3, 60)
    told.enter("x", now=0.0)
    told.enter("y", now=20.0)
    assert told.standing(now=30.0) == (3, 1, pytest.approx(30))
    assert told.standing(now=61.0) == (3, 2, pytest.approx(19))
    assert told.standing(key="bob") == (3, 3, 60)


def test_how_a_key_stands_in_its_day_counts_what_is_in_hand():
    told = Told(gpu_seconds_per_day=10)
    told.enter("x", gpu_seconds=4.0)
    assert told.standing() == (10, 6.0, DAY_S / 2)
    told.leave("x", Use(1.0))
    assert told.standing(now=10.0) == (10, 9.0, DAY_S / 2 - 10)
    assert told.standing(now=DAY_S / 2) == (10, 10.0, DAY_S), "a new day"


def test_of_several_limits_the_one_that_is_nearest():
    told = Told(requests_per_minute=4, gpu_seconds_per_day=10, megapixels_per_day=100)
    told.enter("x", gpu_seconds=1.0)
    assert told.standing().limit == 4
    told.enter("y", gpu_seconds=7.0)
    assert told.standing().limit == 10
    assert Told(max_concurrent=3).standing() is None, "it is over when its client hears of it"


def test_who_comes_in_hears_how_it_stands():
    books, allowance = QuotaLedger(), QuotaLimits(requests_per_minute=2, max_concurrent=1)
    assert books.admit("g", entry("x"), allowance, (), NOON) == (2, 1, 60)
    denial = books.admit("g", entry("y"), allowance, (), NOON)
    assert (denial.name, denial.limit) == ("max_concurrent", 1)


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("max_concurrent", 1),
        ("requests_per_minute", 1),
        ("gpu_seconds_per_day", 1.5),
        ("megapixels_per_day", 1.5),
    ],
)
def test_a_denial_names_its_limit(limit, value):
    told = Told(**{limit: value})
    told.enter("x")
    assert told.enter("y").name == limit


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_limits_go_by_a_clock_that_nobody_sets(jump_s):
    """The date jumps by an hour; a minute stays one, and who runs is not forgotten."""
    date = [NOON]
    books = QuotaLedger(lambda: date[0])
    often, at_once = QuotaLimits(requests_per_minute=2), QuotaLimits(max_concurrent=1)
    for number in range(2):
        assert books.enter("g", entry(f"{number}"), often, (), float(number)) is None
        books.leave("g", f"{number}", "tiny", ())
    assert books.enter("g", entry("runs", "bob"), at_once, (), 2.0) is None
    date[0] += jump_s
    denial = books.enter("g", entry("2"), often, (), 3.0)
    assert denial is not None and denial.retry_after_s == pytest.approx(57.0)
    assert books.enter("h", entry("second", "bob"), at_once, (), 3.0) is not None
    assert books.enter("g", entry("2"), often, (), 61.5) is None


NAMES = st.tuples(st.sampled_from("xyz"), st.sampled_from(("tiny", "tiny-tp2")))
CHANGES = st.one_of(
    st.tuples(st.just("add"), NAMES, st.sampled_from("ab")),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("replace"), st.dictionaries(NAMES, st.sampled_from("ab"))),
)


@given(st.lists(CHANGES, max_size=20))
def test_the_requests_of_a_key_are_found_without_looking_at_others(changes) -> None:
    def entry_of(name: tuple[str, str], key: str) -> UsageEntry:
        return UsageEntry(*name, key, Use(), 1.0)

    session = GatewayUsage(0.0)
    for at, (what, *about) in enumerate(changes):
        if what == "add":
            session.add(entry_of(*about), float(at))
        elif what == "remove":
            session.remove(*about)
        else:
            (whole,) = about
            session.replace([entry_of(*each) for each in whole.items()], float(at))
        for key in "ab":
            found = {(entry.request_id, entry.tier) for entry, _ in session.of(key)}
            every = session.entries.items()
            assert found == {name for name, (entry, _) in every if entry.key == key}
        assert sum(map(len, session.of_keys.values())) == len(session.entries)
        assert all(session.of_keys.values()), "a key without requests is forgotten"
