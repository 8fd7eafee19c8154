"""The command that people type: `serve run serve/laptop.yaml`, and Ctrl-C."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import LAPTOP, serve_run


@pytest.fixture
def serve(tmp_path: Path, port: int) -> Iterator[psutil.Popen]:
    """In token mode."""
    config = tmp_path / "laptop.yaml"
    config.write_text(LAPTOP.read_text().replace("8000", str(port)))
    with serve_run(config, tmp_path, auth_mode="token") as serve:
        yield serve


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
