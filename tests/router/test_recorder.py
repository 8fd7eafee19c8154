"""The recorder: a live cluster's arrivals as a trace, never at a request's cost."""

import threading
import time
from dataclasses import replace

import pytest

from flux_ray.request import ImageRequest, Mask, RgbImage
from flux_ray.router.trace import Recorder, TracedRequest, traced
from flux_ray.simulator.traffic import read_trace

REQUEST = ImageRequest(
    "id", "flux-2-dev", "a secret", 768, 512, 28, 4.0, 1, 2, (RgbImage(1, 1, b"abc"),)
)


def test_a_recording_is_a_trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    recorder = Recorder(path)
    recorder.record(REQUEST, 10.0, 30.0, "team")
    recorder.record(REQUEST, 11.0, None)
    recorder.close()
    assert list(read_trace(path)) == [
        TracedRequest(10.0, "flux-2-dev", 768, 512, 28, 1, 2, 30.0, "team"),
        TracedRequest(11.0, "flux-2-dev", 768, 512, 28, 1, 2, None, ""),
    ]
    assert "secret" not in path.read_text()
    assert recorder.num_dropped == 0


def test_steps_that_are_left_out_are_not_in_it():
    """Of an edit that begins with a quarter of the noise; the simulator prices what is made."""
    edit = ImageRequest("id", "flux-1-dev", "", 64, 64, 28, 3.5, 1, mask=Mask(64, 64, b""))
    assert [traced(each, 0.0).steps for each in (edit, replace(edit, strength=0.25))] == [28, 7]


def test_it_goes_on_where_another_stopped(tmp_path):
    path = tmp_path / "trace.jsonl"
    for at_s in (1.0, 2.0):
        recorder = Recorder(path)
        recorder.record(REQUEST, at_s, None)
        recorder.close()
    assert [entry.at_s for entry in read_trace(path)] == [1.0, 2.0]


def test_the_disk_holds_two_files_at_most(tmp_path):
    path = tmp_path / "trace.jsonl"
    recorder = Recorder(path, max_bytes=1000)
    for second in range(100):
        recorder.record(REQUEST, float(second), None)
    recorder.close()
    assert {file.name for file in tmp_path.iterdir()} == {"trace.jsonl", "trace.jsonl.1"}
    assert all(file.stat().st_size <= 1000 for file in tmp_path.iterdir())
    kept = [*read_trace(tmp_path / "trace.jsonl.1"), *read_trace(path)]
    assert [entry.at_s for entry in kept] == [float(s) for s in range(100 - len(kept), 100)]


def test_a_disk_that_refuses_costs_no_request(tmp_path, caplog):
    recorder = Recorder(tmp_path / "no folder" / "trace.jsonl")
    for _ in range(3):
        recorder.record(REQUEST, 1.0, None)
    recorder.close()
    assert recorder.num_dropped == 3
    assert caplog.text.count("requests are not recorded") == 1


def test_a_request_that_has_no_line_costs_nothing(tmp_path, caplog):
    recorder = Recorder(tmp_path / "trace.jsonl")
    recorder.record(None, 1.0, None)
    recorder.close()
    assert recorder.num_dropped == 1
    assert "could not be recorded" in caplog.text


def test_a_slow_disk_blocks_nobody(tmp_path, monkeypatch):
    may_write = threading.Event()
    monkeypatch.setattr(Recorder, "_append", lambda self, line: may_write.wait(60))
    recorder = Recorder(tmp_path / "trace.jsonl", max_waiting=5)
    started = time.monotonic()
    for _ in range(30_000):
        recorder.record(REQUEST, 1.0, None)
    # Half a second of work; to wait a millisecond each would be too much on any machine.
    assert time.monotonic() - started < 30
    # Five wait, and one is being written.
    assert recorder.num_dropped >= 29_994
    may_write.set()
    recorder.close()


@pytest.mark.parametrize("num_threads", [4])
def test_lines_of_many_threads_stay_whole(num_threads, tmp_path):
    recorder = Recorder(tmp_path / "trace.jsonl")
    threads = [
        threading.Thread(target=lambda: [recorder.record(REQUEST, 1.0, None) for _ in range(200)])
        for _ in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    assert sum(1 for _ in read_trace(tmp_path / "trace.jsonl")) == 200 * num_threads
