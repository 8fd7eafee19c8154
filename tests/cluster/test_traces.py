"""`flux-ray serve` with keys, JSON logs and a collector: traces, logs, the ready line, the end.

One server for all of it, with `tiny` alone.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from flux_ray.auth import change_keys, new_key, with_key
from tests.cluster.conftest import BOOT_S, LAPTOP, PATIENCE_S, ROOT, free_port, wait_until
from tests.otlp_receiver import ReceivedSpan, Receiver, receiver

pytestmark = pytest.mark.slow

# In prompts; in no span and no log.
MARK = "zyzzyva"
# Spans with explicit times are placed by another clock than Serve's.
SKEW_NS = 5_000_000
STAGES = ("encode", "prepare", "denoise", "decode", "file")


@dataclass(frozen=True)
class Served:
    """A running server: its process, what it prints, its collector, and a key's secret."""

    url: str
    run: psutil.Popen
    home: Path
    spans: Receiver
    secret: str

    def headers(self, trace: int) -> dict[str, str]:
        """Return the headers of a client in whose trace of that number a request belongs."""
        return {
            "authorization": f"Bearer {self.secret}",
            "traceparent": f"00-{trace:032x}-{trace:016x}-01",
            "x-request-id": f"client-{trace}",
        }

    def post(self, path: str, trace: int, **fields: Any) -> httpx.Response:
        """Post JSON as a part of that trace."""
        answer = httpx.post(
            f"{self.url}{path}",
            json={"prompt": f"a red circle {MARK}", "model": "tiny", **fields},
            headers=self.headers(trace),
            timeout=PATIENCE_S,
        )
        assert answer.status_code == 200, answer.text
        return answer

    def trace(self, trace: int) -> list[ReceivedSpan]:
        """Return the spans of a trace by their beginning, once all processes have sent theirs.

        What a process ends last arrives last.
        """

        def is_whole() -> bool:
            # Without the methods that Serve's spans name.
            names = {each.name.partition(" tiny ")[0] for each in self.spans.of(f"{trace:032x}")}
            gateway = "replica_handle_request gateway __call__"
            return {"request", gateway, "generate", "replica_handle_request"} <= names

        wait_until(is_whole, what=f"the spans of trace {trace}")
        return self.spans.of(f"{trace:032x}")

    @property
    def output(self) -> str:
        return (self.home / "output").read_text()


def config_for(home: Path, port: int) -> dict[str, Any]:
    """Return serve/laptop.yaml with `tiny` alone, for callers with a key, and JSON logs."""
    config: dict[str, Any] = yaml.safe_load(LAPTOP.read_text())
    config["http_options"]["port"] = port
    config["logging_config"]["encoding"] = "JSON"
    config["applications"] = config["applications"][:2]
    args = config["applications"][0]["args"]
    args |= {"tiers": ["tiny"], "public_url": f"http://127.0.0.1:{port}"}
    args |= {"keys_file": str(home / "keys.yaml"), "key_classes": {"paying": {}}}
    return config


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    port, made = free_port(), new_key("alice", "paying", datetime.now(UTC))
    # A short path: Ray's sockets are in it.
    with tempfile.TemporaryDirectory(prefix="fr") as folder, receiver() as spans:
        home = Path(folder)
        change_keys(home / "keys.yaml", lambda keys: with_key(keys, made.key))
        (home / "traced.yaml").write_text(yaml.safe_dump(config_for(home, port)))
        env = {
            "HOME": folder,
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": folder,
            "RAY_worker_niceness": "0",
            "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "flux_ray.tracing:otlp",
            "RAY_SERVE_TRACING_SAMPLING_RATIO": "1.0",
            "OTEL_EXPORTER_OTLP_ENDPOINT": spans.url,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        with (home / "output").open("w") as output:
            run = psutil.Popen(
                [Path(sys.executable).with_name("flux-ray"), "serve", home / "traced.yaml"],
                cwd=ROOT,
                env=os.environ | env,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        served = Served(f"http://127.0.0.1:{port}", run, home, spans, made.secret)
        try:
            wait_until(lambda: "Ctrl-C stops it" in served.output, timeout_s=BOOT_S, what="ready")
            yield served
        finally:
            if run.is_running():
                for process in (*run.children(recursive=True), run):
                    process.kill()
                run.wait(PATIENCE_S)


def named(spans: list[ReceivedSpan], *names: str) -> list[ReceivedSpan]:
    return [each for each in spans if each.name in names]


def check_path(spans: list[ReceivedSpan], trace: int, method: str) -> None:
    """Check the spans of a request from its client to its replica, and their order."""
    by_id = {each.span: each for each in spans}
    (stage, *_) = named(spans, "encode")
    path, parent = [], stage.parent
    while parent in by_id:
        path.append(by_id[parent].name)
        parent = by_id[parent].parent
    assert parent == f"{trace:016x}", "the client's own span"
    assert path[:3] == [
        f"replica_handle_request tiny {method}",
        f"route_to_replica tiny {method}",
        "generate",
    ]
    assert path[3] == "replica_handle_request gateway __call__"
    assert path[-1] == "request"
    (wait,) = named(spans, "ledger wait")
    (generate,) = named(spans, "generate")
    assert wait.parent == generate.span
    assert generate.begin_ns <= wait.begin_ns <= wait.end_ns <= stage.begin_ns
    (replica,) = named(spans, f"replica_handle_request tiny {method}")
    stages = named(spans, "replica queue", *STAGES, "preview")
    assert {each.parent for each in stages} == {replica.span}
    assert replica.begin_ns - SKEW_NS <= stages[0].begin_ns
    assert stages[-1].end_ns <= replica.end_ns + SKEW_NS
    on_ranks = [each for each in stages if each.name != "file"]
    for before, after in pairwise(on_ranks):
        assert before.end_ns <= after.begin_ns + 1000, (before.name, after.name)


def test_a_request_is_one_trace_of_its_client(served: Served) -> None:
    served.post("/v1/images/generations", 1, n=2)
    spans = served.trace(1)
    check_path(spans, 1, "generate")
    one_image = ["prepare", "denoise", "decode"]
    stages = [each.name for each in named(spans, "encode", *one_image)]
    assert stages == ["encode", *one_image, *one_image]
    assert len(named(spans, "file")) == 2
    (generate,) = named(spans, "generate")
    said = generate.attributes
    assert (said["flux.tier"], said["flux.key"], said["flux.key_class"]) == (
        "tiny",
        "alice",
        "paying",
    )
    assert (said["flux.num_steps"], said["flux.num_images"]) == (4, 2)
    assert said["flux.megapixels"] == pytest.approx(2 * 128 * 128 / 1e6)
    assert said["flux.priced_gpu_s"] > 0 and said["flux.gpu_s"] > 0
    (request,) = named(spans, "request")
    assert request.attributes["http.response.status_code"] == 200
    assert {each.service for each in spans} == {"flux-ray"}
    # About what the leader measured.
    took_s = sum(each.attributes["flux.rank_s"] for each in named(spans, *STAGES[:4]))
    assert took_s <= said["flux.gpu_s"] * 1.01


def test_a_stream_is_one_trace_too(served: Served) -> None:
    served.post("/v1/images/generations", 2, stream=True, partial_images=1)
    spans = served.trace(2)
    check_path(spans, 2, "follow")
    stages = [each.name for each in named(spans, *STAGES[:4], "preview")]
    assert stages == ["encode", "prepare", "denoise", "preview", "denoise", "decode"]


def test_an_edit_is_one_trace_too(served: Served) -> None:
    answer = served.post("/v1/images/generations", 3)
    data = {"prompt": f"make the circle green {MARK}", "model": "tiny"}
    files = {"image": ("red.png", base64.b64decode(answer.json()["data"][0]["b64_json"]))}
    edit = httpx.post(
        f"{served.url}/v1/images/edits",
        data=data,
        files=files,
        headers=served.headers(4),
        timeout=PATIENCE_S,
    )
    assert edit.status_code == 200, edit.text
    spans = served.trace(4)
    check_path(spans, 4, "generate")
    (generate,) = named(spans, "generate")
    assert generate.attributes["flux.num_references"] == 1


def test_a_job_is_in_the_trace_of_what_submitted_it(served: Served) -> None:
    served.post("/v1/tiny", 5)
    spans = served.trace(5)
    (generate,) = named(spans, "generate")
    (encode,) = named(spans, "encode")
    submitted = named(spans, "replica_handle_request gateway __call__")
    assert generate.parent in {each.span for each in submitted}
    assert encode.begin_ns >= generate.begin_ns


def test_probes_are_in_no_trace_and_no_log(served: Served) -> None:
    """Nor is what processes tell each other: all traces here are the clients'."""
    for path in ("/readyz", "/health", "/-/healthz"):
        for trace in (8, 9):
            answer = httpx.get(f"{served.url}{path}", headers=served.headers(trace))
            assert answer.status_code == 200
    served.post("/v1/images/generations", 10)
    served.trace(10)
    for trace in (8, 9):
        assert served.spans.of(f"{trace:032x}") == []
    strangers = {each.trace for each in served.spans.spans} - {f"{n:032x}" for n in range(11)}
    # What this command itself asks for once it is ready: whether there is a page.
    paths = {
        each.attributes.get("url.path")
        for each in served.spans.spans
        if each.trace in strangers and each.name == "request"
    }
    assert paths <= {"/"}
    assert not re.search(r"(GET|HEAD) \S*(/readyz|/health|/-/)", "".join(logs_of(served).values()))


def logs_of(served: Served) -> dict[Path, str]:
    """Return all that Ray, Serve and our command have written."""
    files = [path for path in served.home.rglob("*") if path.is_file() and is_log(path)]
    assert any("replica_gateway" in path.name for path in files)
    return {path: path.read_text(errors="replace") for path in files}


def is_log(path: Path) -> bool:
    return path.suffix in (".log", ".out", ".err") or path.name == "output"


def test_log_lines_name_the_request_and_its_key(served: Served) -> None:
    served.post("/v1/images/generations", 11)
    served.trace(11)

    def lines(part: str) -> list[dict[str, Any]]:
        texts = [text for path, text in logs_of(served).items() if part in path.name]
        found = [json.loads(line) for text in texts for line in text.splitlines()]
        return [line for line in found if line.get("request_id") == "client-11"]

    wait_until(lambda: len(lines("replica_gateway")) >= 2, what="two lines of the gateway")
    image, access = lines("replica_gateway")
    assert "image request" in image["message"]
    assert access["message"].startswith("POST /v1/images/generations 200")
    for line in (image, access):
        assert (line["key"], line["route"]) == ("alice", "/v1/images/generations")
    # The replica's lines have the same id, by which they are found.
    assert lines("replica_tiny")


def test_no_prompt_and_no_secret_is_told(served: Served) -> None:
    served.post("/v1/images/generations", 12)
    served.trace(12)
    told = {
        path: text
        for path, text in logs_of(served).items()
        if MARK in text or served.secret in text
    }
    assert not told.keys()
    assert MARK not in repr(served.spans.spans) and served.secret not in repr(served.spans.spans)


def test_it_says_once_that_it_is_ready_and_ends_without_a_trace(served: Served) -> None:
    """The last test of this file: it ends the server."""
    # Gateways log why they are not ready.
    said = [line for line in served.output.splitlines() if line.startswith("ready: ")]
    assert said == [f"ready: {served.url}"]
    assert "\x1b[" not in served.output
    processes = served.run.children(recursive=True)
    # Ray's daemons leave the tree of their parents.
    processes += [each for each in psutil.process_iter() if str(served.home) in words_of(each)]
    served.run.send_signal(signal.SIGTERM)
    assert served.run.wait(PATIENCE_S) == 0
    assert [each for each in processes if is_running(each)] == []
    assert served.output.endswith("stopped\n")
    assert "Traceback" not in served.output


def is_running(process: psutil.Process) -> bool:
    """Return whether it runs; what nobody waits for, as in a container, stays as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
