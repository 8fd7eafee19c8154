"""The command that people type: `serve run serve/laptop.yaml`, and Ctrl-C."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cluster.conftest import LAPTOP, PATIENCE_S, serve_run, wait_until


@pytest.fixture
def serve(tmp_path: Path, port: int) -> Iterator[psutil.Popen]:
    """Run the command with Ray's authentication by token."""
    config = tmp_path / "laptop.yaml"
    config.write_text(LAPTOP.read_text().replace("8000", str(port)))
    with serve_run(config, tmp_path, auth_mode="token") as serve:
        yield serve


def is_generated(address: str, tier: str) -> bool:
    body = {"model": tier, "prompt": "a red circle"}
    answer = httpx.post(f"{address}/v1/images/generations", json=body, timeout=PATIENCE_S)
    return answer.status_code == 200


@pytest.mark.slow
def test_it_serves_and_leaves_nothing_behind(
    serve: psutil.Popen, port: int, wait_until_ready: Callable[[str], None]
) -> None:
    address = f"http://127.0.0.1:{port}"
    wait_until_ready(address)
    wait_until(lambda: is_generated(address, "tiny-tp2"), what="an image of two ranks")
    children = serve.children(recursive=True)
    assert any("RankActor" in " ".join(child.cmdline()) for child in children)

    serve.send_signal(signal.SIGINT)
    serve.wait(PATIENCE_S)
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
    assert not alive
