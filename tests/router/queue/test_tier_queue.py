"""The queue of a tier over a cluster that does as it is told: order, promises, and books."""

import math
import random

import pytest

from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.router.queue.tier_queue import TierQueue
from tests.router.queue.driver import Cluster


def ticket(name: str, cost_s: float, deadline: float, key: str = "") -> QueuedRequest:
    return QueuedRequest(name, "tiny", cost_s, deadline, key)


def cluster_of(num: int, **options: float) -> Cluster:
    return Cluster(TierQueue(**options), tuple(f"r{number}" for number in range(num)))  # type: ignore[arg-type]


def random_ticket(dice: random.Random, name: str, now: float) -> QueuedRequest:
    cost_s = dice.choice((0.5, 1.0, 2.0, 6.0)) * dice.uniform(0.9, 1.1)
    return ticket(name, cost_s, now + cost_s * dice.uniform(0.9, 4.0), dice.choice("abc"))


def crowded(dice: random.Random, num_replicas: int, num_tickets: int) -> Cluster:
    """A cluster that has been offered too much for a while."""
    cluster = cluster_of(num_replicas)
    for number in range(num_tickets):
        cluster.submit(random_ticket(dice, f"t{number}", cluster.now))
        cluster.run_until(cluster.now + dice.expovariate(num_replicas))
    return cluster


def test_a_free_replica_gets_the_ticket_at_once() -> None:
    cluster = cluster_of(1)
    assert cluster.submit(ticket("a", 1.0, 1.0)) is None
    assert cluster.granted == ["a"]


def test_the_more_urgent_goes_first_and_nothing_is_bound_before_a_replica_is_free() -> None:
    cluster = cluster_of(1)
    for name, deadline in (("running", 100.0), ("late", 90.0), ("early", 50.0), ("mid", 70.0)):
        assert cluster.submit(ticket(name, 10.0, deadline)) is None
    assert cluster.granted == ["running"]
    assert cluster.queue.waiting_s(0.0) == 30.0
    assert cluster.queue.running_s(4.0) == 6.0
    cluster.run_until(100.0)
    assert cluster.granted == ["running", "early", "mid", "late"]


def test_what_would_be_late_is_refused_at_once_and_told_when_to_come_back() -> None:
    cluster = cluster_of(1)
    cluster.submit(ticket("a", 10.0, 10.0))
    refusal = cluster.submit(ticket("b", 2.0, 4.0))
    assert refusal is not None and "deadline" in refusal.reason
    cluster.run_until(refusal.retry_after_s)
    assert 0 < refusal.retry_after_s <= 10.001
    assert cluster.submit(ticket("b again", 2.0, cluster.now + 4.0)) is None


def test_a_deadline_shorter_than_the_work_is_never_worth_a_retry() -> None:
    refusal = cluster_of(1).submit(ticket("a", 2.0, 1.0))
    assert refusal is not None and refusal.retry_after_s == math.inf


def test_the_longest_gives_way_to_shorter_work_and_never_the_other_way_round() -> None:
    cluster = cluster_of(1)
    cluster.submit(ticket("running", 4.0, 4.0))
    assert cluster.submit(ticket("long", 6.0, 10.0)) is None
    assert cluster.submit(ticket("short", 1.0, 5.0)) is None
    assert cluster.refused == ["long"]
    assert cluster.submit(ticket("longer", 7.0, 11.0)) is not None
    assert list(cluster.waiting) == ["short"]


def test_what_has_become_impossible_is_refused_at_hand_over() -> None:
    cluster = cluster_of(1)
    cluster.submit(ticket("slow", 4.0, 9.0))
    cluster.submit(ticket("b", 2.0, 7.0))
    cluster.queue.progress("slow", 6.0, 3.0)
    cluster.now = 5.1
    cluster.take()
    assert cluster.refused == ["b"]


def test_who_is_hopeless_hears_so_wherever_it_stands_in_line() -> None:
    """The longer one came later, and has to begin earlier."""
    queue = TierQueue()
    for name, cost_s, deadline in (("short", 0.5, 60.0), ("long", 9.0, 61.0)):
        patient = QueuedRequest(name, "tiny", cost_s, deadline, has_deadline=False)
        assert queue.submit(patient, 0.0) is None
    assert queue.wake_at() == pytest.approx(52.0)
    [refused] = queue.take(52.1)[1]
    assert refused.request.ticket_id == "long"
    assert queue.wake_at() == pytest.approx(59.5)


def test_reports_correct_the_estimate_and_overdue_work_never_counts_below_zero() -> None:
    cluster = cluster_of(1)
    cluster.submit(ticket("a", 4.0, 9.0))
    cluster.queue.progress("a", 7.0, 1.0)
    assert cluster.queue.running_s(1.0) == 7.0
    assert cluster.queue.running_s(20.0) == 0.0
    cluster.queue.progress("unknown", 7.0, 1.0)


def test_a_bounded_queue_refuses_by_seconds() -> None:
    cluster = cluster_of(1, max_waiting_s=5.0)
    cluster.submit(ticket("a", 4.0, 1000.0))
    assert cluster.submit(ticket("b", 4.0, 1000.0)) is None
    refusal = cluster.submit(ticket("c", 2.0, 1000.0))
    assert refusal is not None and refusal.reason == "the queue is full"
    assert cluster.submit(ticket("d", 1.0, 1000.0)) is None


def test_tickets_are_handed_over_a_little_early_one_at_most() -> None:
    cluster = cluster_of(1, lead_s=0.5)
    for name in "abc":
        cluster.submit(ticket(name, 2.0, 100.0))
    assert cluster.queue.wake_at() == 1.5
    cluster.run_until(1.6)
    assert cluster.granted == ["a", "b"]
    cluster.run_until(100.0)
    assert cluster.granted == ["a", "b", "c"]


def test_what_leaves_before_it_has_begun_does_not_make_the_one_before_it_begin_anew() -> None:
    cluster = cluster_of(1, lead_s=0.5)
    cluster.submit(ticket("running", 8.0, 100.0))
    cluster.submit(ticket("next", 2.0, 100.0))
    cluster.run_until(7.6)
    assert cluster.granted == ["running", "next"]
    cluster.queue.cancel("next", 7.6)
    assert cluster.queue.running_s(7.6) == pytest.approx(0.4)


def test_expected_replicas_are_counted_on_but_not_used() -> None:
    cluster = cluster_of(0)
    cluster.queue.expect_replica("r0", 5.0, 0.0)
    assert cluster.submit(ticket("late", 1.0, 4.0)) is not None
    assert cluster.submit(ticket("fine", 1.0, 7.0)) is None
    assert cluster.granted == []
    assert cluster.queue.running_s(0.0) == 0.0
    cluster.now = 5.0
    cluster.add("r0")
    cluster.take()
    assert cluster.granted == ["fine"]


def test_without_replicas_one_is_hoped_for() -> None:
    cluster = cluster_of(0, cold_start_s=10.0)
    refusal = cluster.submit(ticket("b", 1.0, 5.0))
    assert refusal is not None and refusal.retry_after_s == pytest.approx(6.0)
    assert "no replica is up" in refusal.reason
    assert cluster.submit(ticket("a", 1.0, 30.0)) is None


def test_who_says_what_a_start_takes_by_turns_does_not_put_it_off() -> None:
    cluster = cluster_of(0, cold_start_s=10.0)
    assert cluster.submit(ticket("a", 1.0, 90.0)) is None
    for cluster.now, cold_start_s, left_s in ((2.0, 30.0, 28.0), (4.0, 10.0, 6.0), (6.0, 30.0, 24)):
        cluster.queue.learn_cold_start(cold_start_s)
        assert cluster.queue.positions(cluster.now)["a"].expected_s == pytest.approx(left_s + 1.0)


def test_a_draining_replica_finishes_and_gets_nothing_new() -> None:
    cluster = cluster_of(2)
    cluster.submit(ticket("a", 4.0, 100.0))
    ((_, busy, _),) = cluster.running.values()
    lost = cluster.queue.set_replicas({"r0", "r1"} - {busy}, 0.0, draining=[busy])
    cluster.replicas.discard(busy)
    assert lost == []
    assert cluster.queue.running_s(0.0) == 4.0
    for name in "bc":
        cluster.submit(ticket(name, 1.0, 100.0))
    cluster.run_until(50.0)
    assert sorted(cluster.granted) == ["a", "b", "c"]
    assert cluster.queue.running_s(50.0) == 0.0


def test_the_work_of_a_vanished_replica_comes_back() -> None:
    cluster = cluster_of(2)
    first, second = ticket("a", 4.0, 100.0), ticket("b", 4.0, 100.0)
    cluster.submit(first)
    cluster.submit(second)
    lost = cluster.queue.set_replicas(["r9"], 1.0)
    assert sorted(lost, key=lambda ticket: ticket.ticket_id) == [first, second]
    assert cluster.queue.running_s(1.0) == 0.0
    assert cluster.queue.submit(first, 1.0) is None
    (grant,), _ = cluster.queue.take(1.0)
    assert grant == (first, "r9")


def test_running_work_can_be_adopted() -> None:
    queue = TierQueue()
    queue.adopt(ticket("a", 3.0, 9.0), "r0", 0.0)
    queue.adopt(ticket("a", 3.0, 9.0), "r0", 0.0)
    queue.set_replicas(["r0"], 0.0)
    assert queue.running_s(0.0) == 3.0
    queue.submit(ticket("b", 3.0, 9.0), 0.0)
    assert queue.take(0.0) == ([], [])
    queue.finish("a", 2.0)
    assert [grant.replica for grant in queue.take(2.0)[0]] == ["r0"]


def test_a_replica_that_holds_the_prompt_is_preferred() -> None:
    cluster = cluster_of(3)
    for number in range(3):
        name = f"p{number}"
        cluster.submit(QueuedRequest(name, "tiny", 1.0, 100.0, affinity=((name, 0.2),)))
    homes = {name: replica for name, (_, replica, _) in cluster.running.items()}
    cluster.run_until(10.0)
    for name in ("p2", "p0", "p1"):
        cluster.submit(QueuedRequest(f"{name} again", "tiny", 1.0, 100.0, affinity=((name, 0.2),)))
        assert cluster.running[f"{name} again"][1] == homes[name]


def test_of_several_slots_those_of_the_least_loaded_replica_come_first() -> None:
    cluster = Cluster(TierQueue(slots_per_replica=2), ("r0", "r1"), num_slots=2)
    for name in "abcde":
        cluster.submit(ticket(name, 2.0, 100.0))
    assert [cluster.running[name][1] for name in "abcd"] == ["r0", "r1", "r0", "r1"]
    assert list(cluster.waiting) == ["e"]


def test_leaving_is_idempotent_and_ids_are_unique() -> None:
    cluster = cluster_of(1)
    cluster.submit(ticket("a", 2.0, 100.0))
    cluster.submit(ticket("b", 2.0, 100.0))
    with pytest.raises(ValueError, match="here already"):
        cluster.queue.submit(ticket("b", 2.0, 100.0), 0.0)
    for name in ("b", "b", "a", "a", "unknown"):
        cluster.queue.cancel(name, 0.0)
        cluster.queue.finish(name, 0.0)
    assert (cluster.queue.waiting_s(0.0), cluster.queue.running_s(0.0)) == (0.0, 0.0)
    assert cluster.queue.take(0.0) == ([], [])


@pytest.mark.parametrize("seed", range(30))
def test_promises_are_kept(seed: int) -> None:
    """Who is granted is done in time; nobody is granted twice, and nobody is lost."""
    dice = random.Random(seed)
    cluster = crowded(dice, dice.choice((1, 2, 5, 40)), 300)
    cluster.run_until(1e6)
    assert not cluster.waiting and not cluster.running
    assert len(cluster.granted) + len(cluster.refused) == 300
    assert len(set(cluster.granted + cluster.refused)) == 300


@pytest.mark.parametrize("seed", range(60))
def test_the_time_to_come_back_is_honest(seed: int) -> None:
    dice = random.Random(seed)
    num_replicas = dice.choice((1, 2, 5, 40))
    cluster = crowded(dice, num_replicas, dice.randrange(30, 400))
    cost_s = dice.choice((0.5, 2.0, 6.0))
    patience_s = cost_s * dice.uniform(1.0, 3.0)
    refusal = cluster.submit(ticket("first", cost_s, cluster.now + patience_s, "b"))
    if refusal is None:
        return
    assert 0 <= refusal.retry_after_s < math.inf
    cluster.run_until(cluster.now + refusal.retry_after_s)
    assert cluster.submit(ticket("again", cost_s, cluster.now + patience_s, "b")) is None


def disturb(cluster: Cluster, dice: random.Random, number: int) -> None:
    """One thing that happens in a cluster."""
    event = dice.choice(("offer", "offer", "offer", "pass", "lose", "add", "cancel", "report"))
    known = sorted(cluster.waiting) + sorted(cluster.running)
    if event == "offer":
        cluster.submit(random_ticket(dice, f"t{number}", cluster.now))
    elif event == "pass":
        cluster.run_until(cluster.now + dice.expovariate(2.0))
    elif event == "add":
        cluster.add(f"r{number}")
    elif event == "lose" and len(cluster.replicas) > 1:
        for lost in cluster.lose(dice.choice(sorted(cluster.replicas))):
            cluster.submit(lost)
    elif known and event == "cancel":
        name = dice.choice(known)
        cluster.queue.cancel(name, cluster.now)
        cluster.waiting.pop(name, None)
        cluster.running.pop(name, None)
    elif cluster.running and event == "report":
        cluster.queue.progress(dice.choice(sorted(cluster.running)), dice.random(), cluster.now)
    cluster.take()


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("lead_s", [0.0, 0.2])
def test_the_books_balance_after_anything(seed: int, lead_s: float) -> None:
    dice = random.Random(seed)
    cluster = cluster_of(3, lead_s=lead_s)
    for number in range(200):
        disturb(cluster, dice, number)
        waiting_s = sum(ticket.cost_s for ticket in cluster.waiting.values())
        assert cluster.queue.waiting_s(cluster.now) == pytest.approx(waiting_s, abs=1e-9)
    for name in sorted(cluster.waiting) + sorted(cluster.running):
        cluster.queue.cancel(name, cluster.now)
    assert cluster.queue.waiting_s(cluster.now) == 0.0
    assert cluster.queue.running_s(cluster.now) == 0.0


def test_equal_histories_give_equal_decisions() -> None:
    first, second = (crowded(random.Random(3), 5, 300) for _ in range(2))
    assert (first.granted, first.refused) == (second.granted, second.refused)


def test_a_job_that_can_wait_is_not_refused_because_others_are_in_a_hurry() -> None:
    """Nor does it matter how many hasty requests came before, or that they wait."""
    cluster = cluster_of(1)
    for number in range(400):
        assert cluster.submit(ticket(f"warm-up {number}", 1.0, cluster.now + 8.0)) is None
        cluster.run_until(cluster.now + 1.0)
    for number in range(14):
        assert cluster.submit(ticket(f"hasty {number}", 1.0, cluster.now + 30.0)) is None
    assert cluster.queue.waiting_s(cluster.now) == pytest.approx(13.0)
    assert cluster.submit(ticket("job", 1.0, cluster.now + 450.0)) is None
    cluster.run_until(cluster.now + 15.0)
    assert cluster.refused == []
    assert cluster.granted[-1] == "job"
