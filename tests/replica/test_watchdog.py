"""A rank that hears no more of its leader ends, and no other does."""

import threading
import time

import pytest

from flux_ray.replica.watchdog import LeaderWatch


class Rank:
    """What would end; its leader pings as often as it is told to."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.watch = LeaderWatch("tiny rank 1", limit_s=0.2, look_s=0.02, end=self.ended.set)
        self.watch.start()

    def ping_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.watch.hear()
            time.sleep(0.005)


def test_a_rank_ends_when_its_leader_has_fallen_silent(serve_log: pytest.LogCaptureFixture) -> None:
    rank = Rank()
    rank.ping_for(0.5)
    assert not rank.ended.is_set()
    assert rank.ended.wait(60)
    assert "tiny rank 1 ends: its leader hangs" in serve_log.text


def test_a_rank_waits_for_the_first_ping_for_as_long_as_the_others_load() -> None:
    rank = Rank()
    assert not rank.ended.wait(0.6)
    rank.watch.hear()
    assert rank.ended.wait(60)
