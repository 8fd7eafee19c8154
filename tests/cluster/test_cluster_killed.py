"""The whole cluster is killed and started again: no job is lost, no finished one generated anew."""

import base64
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.cluster.conftest import LAPTOP, PATIENCE_S, serve_run, wait_until
from tests.cluster.storm import PROMPT

NUM_JOBS = 24
NUM_READY_AT_KILL = 3


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Return the folder of the job database and the images."""
    return tmp_path / "kept"


@pytest.fixture
def config_file(tmp_path: Path, port: int, kept: Path) -> Path:
    """Return serve/laptop.yaml with one tier, and so few jobs at once that some have to wait."""
    config = yaml.safe_load(LAPTOP.read_text().replace("8000", str(port)))
    gateway, tiny, _ = config["applications"]
    config["applications"] = [gateway, tiny]
    gateway["args"] |= {
        "tiers": ["tiny"],
        "jobs": {
            "database": f"sqlite:///{kept}/jobs.sqlite3",
            "results": f"{kept}/results",
            "max_running": 4,
        },
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


class Client:
    """A client that submits jobs, each with its own seed, and asks for their results."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=PATIENCE_S)
        self.polling_urls: list[str] = []

    def submit(self) -> None:
        for seed in range(NUM_JOBS):
            body = {"prompt": PROMPT, "seed": seed, "width": 192, "height": 192}
            told = self.http.post("/v1/tiny", json=body | {"output_format": "png"}).json()
            self.polling_urls.append(told["polling_url"])

    def ready(self) -> dict[int, dict[str, Any]]:
        """Return the results of the jobs that are ready, by seed."""
        answers = [self.http.get(url).json() for url in self.polling_urls]
        assert {told["status"] for told in answers} <= {"Pending", "Ready"}, answers
        return {seed: told["result"] for seed, told in enumerate(answers) if told["result"]}

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.ready()) >= count, what=f"{count} ready")

    def fetch(self, result: dict[str, Any]) -> bytes:
        answer = self.http.get(result["sample"])
        assert answer.status_code == 200, answer.text
        return answer.content

    def generate(self, seed: int) -> bytes:
        """Return the image of a seed, asked for without a job."""
        body = {"model": "tiny", "prompt": PROMPT, "seed": seed, "size": "192x192"}
        [image] = self.http.post("/v1/images/generations", json=body).json()["data"]
        return base64.b64decode(image["b64_json"])


def lasting(results: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the results without the queries of their URLs, which expire and are signed anew."""
    return {
        seed: told | {"sample": httpx.URL(told["sample"]).path} for seed, told in results.items()
    }


def kill(serve: psutil.Popen) -> None:
    """Kill all processes of its Ray at once.

    They are stopped first, so that none can react to the death of another.
    """
    stopped: set[psutil.Process] = set()
    while fresh := {serve, *serve.children(recursive=True)} - stopped:
        stopped |= fresh
        for process in fresh:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
    names = {process.name() for process in stopped if process.is_running()}
    assert names >= {"gcs_server", "raylet", "ray::RankActor"}, names
    for process in stopped:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(stopped, timeout=PATIENCE_S)
    assert not alive


def statuses(kept: Path, copy: Path) -> Counter[str]:
    """Count the jobs by status, in a copy: the database itself stays as the kill left it."""
    shutil.copytree(kept, copy)
    with closing(sqlite3.connect(copy / "jobs.sqlite3")) as database:
        return Counter(status for (status,) in database.execute("SELECT status FROM flux_jobs"))


@pytest.mark.slow
def test_a_killed_cluster_ends_every_job_when_it_is_started_again(
    config_file: Path,
    kept: Path,
    port: int,
    tmp_path: Path,
    wait_until_ready: Callable[[str], None],
    record_property: Callable[[str, object], None],
) -> None:
    client = Client(address := f"http://127.0.0.1:{port}")
    with client.http, serve_run(config_file, tmp_path) as serve:
        wait_until_ready(address)
        client.submit()
        client.wait_for(NUM_READY_AT_KILL)
        early = client.ready()
        kill(serve)
    at_kill = statuses(kept, tmp_path / "as_killed")
    assert at_kill.keys() == {"ready", "running", "pending"}, at_kill
    assert at_kill.total() == NUM_JOBS

    began_s = time.monotonic()
    with (
        httpx.Client(base_url=address, timeout=PATIENCE_S) as http,
        serve_run(config_file, tmp_path),
    ):
        client.http = http
        wait_until_ready(address)
        boot_s = time.monotonic() - began_s
        client.wait_for(NUM_JOBS)
        took_s = time.monotonic() - began_s
        results = client.ready()
        images = [client.fetch(results[seed]) for seed in range(NUM_JOBS)]
        assert images == [client.generate(seed) for seed in range(NUM_JOBS)]
        assert lasting(results).items() >= lasting(early).items()
        assert lasting(client.ready()) == lasting(results)
    record_property("restart_to_ready_s", took_s)
    print(f"at the kill {dict(at_kill)}; up after {boot_s:.1f} s, all ready after {took_s:.1f} s")
