"""Who is missed: those that were heard once, and only for time in which the watcher was awake."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ray import liveness
from flux_ray.liveness import Liveness, NextSign, Watch, end_process, stands_still

LIMIT_S = 10.0


def look_every_second(signs: Liveness, began: float, num_looks: int) -> list[str]:
    """What the last look says."""
    looks = [signs.look(began + second) for second in range(num_looks)]
    return looks[-1]


def test_who_falls_silent_is_missed_after_the_limit_and_not_before():
    signs = Liveness(LIMIT_S, look_s=1.0)
    signs.look(0.0)
    signs.hear("one")
    assert look_every_second(signs, 0.0, 11) == []
    assert signs.look(11.0) == ["one"]
    signs.hear("one")
    assert signs.look(12.0) == []


def test_who_was_never_heard_is_not_missed_unless_expected():
    signs = Liveness(LIMIT_S, look_s=1.0)
    signs.look(0.0)
    assert look_every_second(signs, 0.0, 100) == []
    signs.expect("one")
    assert look_every_second(signs, 99.0, 11) == []
    signs.expect("one")
    assert signs.look(110.0) == ["one"], "being expected is no sign of life"
    signs.forget("one")
    assert signs.look(111.0) == []


@pytest.mark.parametrize("stalled_s", [3.0, 60.0, 86_400.0])
def test_a_watcher_that_stood_still_misses_nobody_for_it(stalled_s: float):
    """A machine that was suspended, or a process that was stopped."""
    signs = Liveness(LIMIT_S, look_s=1.0)
    signs.look(0.0)
    signs.hear("one")
    assert look_every_second(signs, 0.0, 8) == []
    assert signs.look(7.0 + stalled_s) == []
    assert signs.look(8.0 + stalled_s) == []


def test_one_that_is_starved_takes_longer_but_does_miss():
    signs = Liveness(LIMIT_S, look_s=1.0)
    signs.look(0.0)
    signs.hear("one")
    looks = [signs.look(5.0 * number) for number in range(1, 10)]
    assert looks.index(["one"]) == 5, "30 s by the clock, of which 12 count"


@given(
    gaps=st.lists(st.floats(0, 1e6), max_size=60),
    answers=st.sets(st.integers(0, 59)),
)
def test_whoever_answers_between_any_few_looks_is_never_missed(
    gaps: list[float], answers: set[int]
):
    """However long those looks are apart."""
    signs = Liveness(LIMIT_S, look_s=1.0)
    now, since = 0.0, 0
    signs.look(now)
    signs.hear("one")
    for number, gap_s in enumerate(gaps):
        now += gap_s
        since += 1
        missed = signs.look(now)
        assert not missed or since * 2 > LIMIT_S
        if number in answers:
            signs.hear("one")
            since = 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "ASK_S", 0.001)


class Clock:
    """A second passes from one look to the next."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


async def hung_in(watch: Watch, num_looks: int) -> list[str]:
    found = []
    for _ in range(num_looks):
        await asyncio.sleep(0.005)
        found += watch.hung()
    return found


async def answers() -> None:
    """At once."""


async def test_one_among_others_that_hangs_is_named_once(quick: None):
    watch = Watch(3.0, Clock())
    stops = asyncio.Event()
    asked = 0

    async def hangs() -> None:
        nonlocal asked
        asked += 1
        if stops.is_set():
            await asyncio.Event().wait()

    watch.follow("well", answers)
    watch.follow("stopped", hangs)
    assert await hung_in(watch, 10) == []
    assert asked > 1
    stops.set()
    assert await hung_in(watch, 10) == ["stopped"]
    assert watch.names == {"well"}


async def test_one_that_is_dead_is_asked_no_more_and_not_missed(quick: None):
    watch = Watch(3.0, Clock())

    async def dies() -> None:
        raise ConnectionError

    watch.follow("dead", dies)
    assert await hung_in(watch, 8) == []
    assert watch.names == frozenset()


async def test_one_that_starts_has_all_the_time_that_it_takes(quick: None):
    watch = Watch(3.0, Clock())
    watch.follow("starting", asyncio.Event().wait)
    assert await hung_in(watch, 10) == []
    watch.expect("starting")
    assert await hung_in(watch, 10) == ["starting"]


def test_an_answer_may_say_that_the_next_one_takes_longer() -> None:
    signs = Liveness(LIMIT_S, look_s=1.0)
    signs.look(0.0)
    signs.hear("loading", 3 * LIMIT_S)
    assert look_every_second(signs, 0.0, 31) == []
    assert signs.look(31.0) == ["loading"]


def test_who_is_expected_has_the_usual_time_from_then_on() -> None:
    signs = Liveness(LIMIT_S, look_s=1.0)
    signs.look(0.0)
    signs.hear("loading", 100 * LIMIT_S)
    signs.expect("loading")
    for second in range(1, 11):
        assert signs.look(float(second)) == []
        signs.expect("loading")
    assert signs.look(11.0) == ["loading"]


@pytest.mark.parametrize(("answer", "hung_after_s"), [(41_234, 3), (NextSign(6.0), 6)])
async def test_only_such_an_answer_counts_and_no_other_number(
    answer: object, hung_after_s: int
) -> None:
    watch, answers = Watch(3.0, Clock()), [answer]

    async def ask() -> object:
        if answers:
            return answers.pop()
        return await asyncio.Event().wait()

    watch.follow("one", ask)
    await asyncio.sleep(0.05)
    assert [watch.hung() for _ in range(hung_after_s)] == [[]] * hung_after_s
    assert await hung_in(watch, 2) == ["one"]


async def test_a_question_is_unanswered_from_when_it_was_asked_until_the_answer(
    quick: None,
) -> None:
    """Also the first one: who has hung for long is known by it as soon as anybody else."""
    watch, answers = Watch(100.0, Clock()), asyncio.Event()

    async def ask() -> None:
        await answers.wait()

    watch.follow("one", ask)
    await asyncio.sleep(0)
    assert [watch.hung() for _ in range(5)] == [[]] * 5
    assert (watch.unanswered_s("one"), watch.unanswered_s("another")) == (4.0, 0.0)
    answers.set()
    await hung_in(watch, 20)
    assert watch.unanswered_s("one") < 2.0
    answers.clear()
    await hung_in(watch, 20)
    assert watch.unanswered_s("one") > 10.0
    watch.stop()
    assert (watch.unanswered_s("one"), watch.names) == (0.0, frozenset({"one"}))
    await asyncio.sleep(0.01)
    assert watch.names == frozenset()


BUSY, ASLEEP = "while True: pass", "import time; time.sleep(1000)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("program", "is_stopped", "expected"),
    [(BUSY, False, False), (BUSY, True, True), (ASLEEP, False, True), (ASLEEP, True, True)],
    ids=["busy", "busy and stopped", "waiting for good", "waiting and stopped"],
)
def test_what_stands_still_is_told_from_what_is_busy(
    program: str, is_stopped: bool, expected: bool
) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", program])
    try:
        # It has to be through with starting.
        time.sleep(0.5)
        if is_stopped:
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.2)
        began = stands_still(process.pid, 0.3)
        assert (began is not None) is expected
        assert stands_still(process.pid, 0.0, min_age_s=60.0) is None, "it may be loading"
        time.sleep(0.2)
        assert stands_still(process.pid, 0.2, min_age_s=1.0) == began
    finally:
        process.kill()
        process.wait()
    assert stands_still(process.pid, 0.0) is None, "it is gone"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_only_the_process_that_was_looked_at_is_ended() -> None:
    """An order may come late, when another process has the number."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ASLEEP])
    try:
        # It has to be through with starting.
        time.sleep(0.5)
        began = stands_still(process.pid, 0.1)
        assert began is not None
        end_process(process.pid, began - 1)
        assert process.poll() is None
        end_process(process.pid, began)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    end_process(process.pid, began)
