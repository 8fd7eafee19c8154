"""drain_node.sh, the preStop of a worker: tell Ray, wait for Serve, and never for ever."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kuberay.conftest import CHART

SCRIPT = CHART / "files" / "drain_node.sh"
NODE = "4dc38b40ea6b4c67e580882ebc1ef646796a0c867a49e31eada6792a"
RAYLET = ("/ray/raylet", "--raylet_name=x", f"--node_id={NODE}", "--agent=y --node-id=other")


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    """Return a folder with the processes of a Pod, and a `ray` that writes down what it is told."""
    programs = tmp_path / "bin"
    programs.mkdir()
    ray = programs / "ray"
    told = tmp_path / "told"
    write_down = f'echo "$@" >> {told}'
    answer = f'[ "$(wc -l < {told})" -gt "${{NUM_FAILURES:-0}}" ]'
    ray.write_text(f"#!/bin/sh\n{write_down}\n{answer}\n")
    ray.chmod(0o755)
    return tmp_path


def add_process(pod: Path, number: int, *words: str) -> Path:
    folder = pod / "proc" / str(number)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    return folder / "cmdline"


@pytest.fixture(autouse=True)
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Listen as the head does, and tell its address; close it to take the head away."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        yield listening


def drain(pod: Path, notice_s: int, **env: str) -> subprocess.CompletedProcess[str]:
    told = {
        "PATH": f"{pod / 'bin'}:{os.environ['PATH']}",
        "PROC": str(pod / "proc"),
        "EVERY_S": "0.01",
        "RAY_ADDRESS": os.environ["RAY_ADDRESS"],
    }
    return subprocess.run(
        ["bash", SCRIPT, str(notice_s)], env=told | env, capture_output=True, text=True, timeout=60
    )


def test_ray_is_told_how_long_this_node_has(pod: Path) -> None:
    add_process(pod, 10, *RAYLET)
    done = drain(pod, 880)
    *words, notice_s = (pod / "told").read_text().split()
    assert words == [
        *("drain-node", "--address", os.environ["RAY_ADDRESS"], "--node-id", NODE),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "Kubernetes", "ends", "this", "Pod"),
        "--deadline-remaining-seconds",
    ]
    # What has passed since the script began is gone.
    assert 820 < int(notice_s) <= 880
    assert done.returncode == 0


@pytest.mark.parametrize("title", ["ray::ServeReplica:tiny:tiny", "ray::ProxyActor"])
def test_it_waits_for_replicas_and_the_proxy(title: str, pod: Path) -> None:
    add_process(pod, 10, *RAYLET)
    busy = add_process(pod, 11, title)
    # It goes away while the script waits.
    timer = threading.Timer(0.5, busy.unlink)
    timer.start()
    began_s = time.monotonic()
    done = drain(pod, 600)
    timer.join()
    assert time.monotonic() - began_s >= 0.5
    assert "drained within" in done.stdout


def test_other_processes_are_not_waited_for(pod: Path) -> None:
    """The ledger and Ray's own agents end with the Pod; so does a shell that names a replica."""
    add_process(pod, 10, *RAYLET)
    add_process(pod, 11, "ray::LedgerActor")
    add_process(pod, 12, "grep", "-e", "^ray::ServeReplica:")
    assert "drained within" in drain(pod, 600).stdout


def test_it_ends_before_kubernetes_does(pod: Path) -> None:
    add_process(pod, 10, *RAYLET)
    add_process(pod, 11, "ray::ServeReplica:tiny:tiny")
    assert "still busy after 1 s" in drain(pod, 1).stderr


def test_a_head_that_restarts_is_told_again(pod: Path) -> None:
    add_process(pod, 10, *RAYLET)
    assert "drained within" in drain(pod, 600, NUM_FAILURES="2").stdout
    assert len((pod / "told").read_text().splitlines()) == 3


@pytest.mark.parametrize("num_failures", ["0", "1000000"], ids=["it heard", "it did not hear"])
def test_it_does_not_wait_for_a_head_that_is_gone(
    num_failures: str, pod: Path, head: socket.socket
) -> None:
    """The whole cluster is being deleted: nobody takes over, and the next one needs the cards."""
    add_process(pod, 10, *RAYLET)
    add_process(pod, 11, "ray::ServeReplica:tiny:tiny")
    head.close()
    done = drain(pod, 600, NUM_FAILURES=num_failures, PATIENCE_S="1")
    assert done.returncode == 0
    assert "the head is gone: not waiting" in done.stderr
    assert (pod / "told").read_text().startswith("drain-node")


def test_there_is_nothing_to_drain_without_a_raylet(pod: Path) -> None:
    add_process(pod, 10, "sleep", "1")
    assert "no raylet" in drain(pod, 600).stderr
    assert not (pod / "told").exists()
