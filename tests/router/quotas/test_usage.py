"""What keys used, told back and forth."""

from flux_ray.router.quotas import DAY_S, Usage, Use

NOON = 20_000.5 * DAY_S


def test_gateways_add_up_and_nothing_counts_twice():
    a, b, ledger = Usage(), Usage(), Usage()
    a.add("a", "alice", Use(2.0, 1.0), NOON)
    ledger.merge(a.rows())
    a.add("a", "alice", Use(3.0, 1.0), NOON)
    b.add("b", "alice", Use(10.0, 4.0), NOON)
    b.add("b", "bob", Use(7.0, 7.0), NOON)
    for each in (b, a, b, a):
        ledger.merge(each.rows())
        each.merge(ledger.rows())
    for each in (a, b, ledger):
        assert each.of("alice", NOON) == Use(15.0, 6.0)
        assert each.of("bob", NOON) == Use(7.0, 7.0)
        assert each.of("nobody", NOON) == Use()


def test_what_is_told_late_takes_nothing_back():
    a, ledger = Usage(), Usage()
    a.add("a", "alice", Use(2.0), NOON)
    late = a.rows()
    a.add("a", "alice", Use(2.0), NOON)
    ledger.merge(a.rows())
    ledger.merge(late)
    assert ledger.of("alice", NOON) == Use(4.0)


def test_any_gateway_can_tell_of_all():
    a, b = Usage(), Usage()
    a.add("a", "alice", Use(2.0), NOON)
    b.merge(a.rows())
    again = Usage()
    again.merge(b.rows_of("alice"))
    assert again.of("alice", NOON) == Use(2.0)


def test_a_day_ends_at_midnight_and_is_forgotten_later():
    usage = Usage()
    midnight = 20_001 * DAY_S
    usage.add("a", "alice", Use(2.0), midnight - 0.001)
    assert usage.of("alice", midnight - 0.001) == Use(2.0)
    assert usage.of("alice", midnight) == Use()
    usage.forget(midnight)
    assert len(usage.rows()) == 1
    usage.forget(midnight + DAY_S)
    assert usage.rows() == ()
