"""The command that people type: `serve run serve/laptop.yaml`, and Ctrl-C."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def serve(tmp_path: Path, port: int) -> Iterator[psutil.Popen]:
    """`serve run` with a home of its own, in token mode; whatever is left of it is killed."""
    config = tmp_path / "laptop.yaml"
    config.write_text((ROOT / "serve/laptop.yaml").read_text().replace("8000", str(port)))
    serve = psutil.Popen(
        [Path(sys.executable).parent / "serve", "run", config],
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell in the background would have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    yield serve
    if serve.is_running():
        for process in (*serve.children(recursive=True), serve):
            process.kill()
        serve.wait(10)


@pytest.mark.slow
def test_it_serves_and_leaves_nothing_behind(
    serve: psutil.Popen, port: int, wait_until_ready: Callable[[str], None]
) -> None:
    wait_until_ready(f"http://127.0.0.1:{port}")
    children = serve.children(recursive=True)
    assert any("RankActor" in " ".join(child.cmdline()) for child in children)

    serve.send_signal(signal.SIGINT)
    serve.wait(30)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
