"""`flux-ray doctor`: each judgement, each probe, and how the command ends."""

import json
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from huggingface_hub import constants
from rich.console import Console
from typer.testing import CliRunner

from flux_ray.cli import doctor as doctor_module
from flux_ray.cli import probes
from flux_ray.cli.diagnosis import (
    Diagnosis,
    judge_auth,
    judge_clock,
    judge_compiler,
    judge_disk,
    judge_driver,
    judge_job_file,
    judge_nccl,
    judge_open_files,
    judge_port,
    judge_shared_memory,
    judge_tracing,
    judge_upsampler,
    judge_versions,
)
from flux_ray.cli.doctor import show
from flux_ray.cli.main import app
from flux_ray.config import GatewayArgs, TierArgs, Upsampling
from flux_ray.weights.download import fetch
from flux_ray.weights.hub import hub_date
from flux_ray.weights.source import ALL_PARTS, source_for
from tests.fake_hub import COMMIT, REPOSITORY, FakeHub, serve_hub, use_hub

LAPTOP = Path(__file__).parents[2] / "serve" / "laptop.yaml"
GB = 10**9


def torch(**facts: Any) -> dict[str, Any]:
    usual = {"version": "2.13.0", "cuda": "13.0", "available": True, "count": 8, "error": ""}
    return usual | {"nccl": "2.28.9"} | facts


@pytest.mark.parametrize(
    ("diagnosis", "state", "said"),
    [
        (judge_driver(torch(), "580.65.06", True), "ok", "driver 580.65.06, torch 2.13.0"),
        (judge_driver(torch(), "550.90", True), "problem", "too old for torch's CUDA 13.0; update"),
        (judge_driver(torch(), None, True), "problem", "no NVIDIA driver answers"),
        (judge_driver(torch(cuda=None), "580.1", True), "problem", "built without CUDA; install"),
        (judge_driver(torch(available=False, error="x"), "580.1", True), "problem", "no GPU: x"),
        (judge_driver(torch(cuda=None), None, False), "ok", "no tier asks for a GPU"),
        (judge_driver(None, "580.1", False), "problem", "torch does not import"),
        (judge_nccl(torch(), 2, True), "ok", "NCCL 2.28.9"),
        (judge_nccl(torch(nccl=None), 2, True), "problem", "2 ranks need it"),
        (judge_nccl(torch(nccl=None), 1, True), "ok", "not needed"),
        (judge_nccl(torch(nccl=None), 2, False), "ok", "not needed"),
        (judge_shared_memory(64 * 2**20, 1), "problem", "--shm-size"),
        (judge_shared_memory(2 * GB, 8), "warning", "little for 8 ranks"),
        (judge_shared_memory(8 * GB, 8), "ok", "8.0 GB"),
        (judge_shared_memory(None, 1), "warning", "mount"),
        (judge_port(8000, "127.0.0.1", False, False), "ok", "free"),
        (judge_port(8000, "127.0.0.1", True, True), "ok", "a Serve answers"),
        (judge_port(8000, "127.0.0.1", True, False), "problem", "another program has it"),
        (judge_auth("token", True), "ok", "by token"),
        (judge_auth("token", False), "problem", "ray get-auth-token --generate"),
        (judge_auth(None, True), "warning", "is not set"),
        (judge_auth("disabled", True), "warning", "can run code"),
        (judge_auth("tokn", True), "problem", "unknown to Ray"),
        (judge_tracing(None, None), "ok", "none"),
        (judge_tracing("a:b", None), "ok", "a:b"),
        (judge_tracing("a:b", "ModuleNotFoundError: a"), "problem", "Serve would not start"),
        (judge_clock(None), "ok", "not compared"),
        (judge_clock(-3), "ok", "3 s behind"),
        (judge_clock(20), "warning", "20 s ahead"),
        (judge_clock(-600), "problem", "time synchronisation"),
        (judge_job_file(None, []), "ok", "PostgreSQL"),
        (judge_job_file("j", []), "ok", "not in use"),
        (judge_job_file("j", ["a"]), "ok", "one cluster"),
        (judge_job_file("j", ["a", "b"]), "problem", "take each other's jobs"),
        (judge_compiler("/usr/bin/cc", True), "ok", "/usr/bin/cc"),
        (judge_compiler(None, True), "warning", "install gcc"),
        (judge_compiler(None, False), "ok", "none"),
        (judge_disk(100 * GB, 0, "/d"), "ok", "100 GB free"),
        (judge_disk(100 * GB, 113 * GB, "/d"), "problem", "HF_HOME"),
        (judge_disk(200 * GB, 113 * GB, "/d"), "ok", "113 GB of weights"),
        (judge_open_files(1024), "warning", "ulimit -n 65536"),
        (judge_open_files(65536), "ok", "65536"),
        (judge_versions({"Ray": "2.60.0"}, {}), "ok", "no cluster answers"),
        (judge_versions({"Ray": "2.60.0"}, {"Ray": "2.60.0"}), "ok", "as on the cluster"),
        (judge_versions({"Ray": "2.60.0"}, {"Ray": "2.59.0"}), "problem", "install the same"),
        (judge_versions({"Python": "3.11.7"}, {"Python": "3.11.2"}), "ok", "as on"),
        (judge_versions({"Python": "3.11.7"}, {"Python": "3.12.7"}), "problem", "3.12.7 on"),
        (judge_versions({"Python": "3.11.7"}, {"Python": None}), "ok", "as on"),
    ],
)
def test_what_is_judged(diagnosis: Diagnosis, state: str, said: str) -> None:
    assert diagnosis.state == state
    assert said in diagnosis.said
    if state != "ok":
        assert len(diagnosis.said) > 20, "it says what to do"


WEIGHTS = f"{REPOSITORY}@{COMMIT}"
SHARD = "transformer/model.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub({"model_index.json": b"{}", SHARD: bytes(3_000_000)}) as hub:
        use_hub(monkeypatch, hub.address, cache)
        yield hub


def said_of_weights(weights: str) -> tuple[Diagnosis, Diagnosis]:
    """Return what is said of a tier's weights, and of the disk for them."""
    args = TierArgs(tier="flux-2-klein-4b", weights=weights)
    found, disk, _ = doctor_module.examine_weights([args])
    assert found.what == "weights of flux-2-klein-4b"
    return found, disk


def test_weights_that_are_to_be_downloaded_and_are_here(hub: FakeHub, cache: Path) -> None:
    found, disk = said_of_weights(WEIGHTS)
    assert (found.state, found.said) == (
        "ok",
        f"{WEIGHTS}: 0.003 GB not here yet; each node downloads them at its first start",
    )
    assert "0 GB of weights" in disk.said and str(cache) in disk.said
    assert not [path for path in cache.rglob("*") if path.is_file()], "it changes nothing"
    fetch(source_for(WEIGHTS), ALL_PARTS)
    hub.requests.clear()
    found, disk = said_of_weights(WEIGHTS)
    assert (found.state, found.said) == ("ok", f"{WEIGHTS}: on this machine")
    assert "GB of weights" not in disk.said
    assert hub.requests == ["HEAD /"], "for the time"


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (WEIGHTS, "is gated: accept its licence at"),
        (f"owner/none@{COMMIT}", "shows no repository owner/none"),
        ("/no/folder", "has no folder /no/folder"),
    ],
)
def test_weights_that_cannot_be_had(hub: FakeHub, weights: str, said: str) -> None:
    """As a start says it, with the command that tries it again."""
    hub.is_gated = True
    found, _ = said_of_weights(weights)
    assert found.state == "problem"
    assert said in found.said
    assert "flux-ray weights pull" in found.said


def test_a_hub_that_is_forbidden_or_silent(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found, _ = said_of_weights(WEIGHTS)
    assert found.state == "warning"
    assert "HF_HUB_OFFLINE forbids" in found.said
    assert hub.requests == []
    use_hub(monkeypatch, "http://127.0.0.1:1", cache)
    found, _ = said_of_weights(WEIGHTS)
    assert found.state == "warning"
    assert "http://127.0.0.1:1 cannot be reached" in found.said
    assert hub_date() is None


LLM_URL = "http://llm.invalid/v1/"


@pytest.mark.parametrize(
    ("status", "body", "heard", "state"),
    [
        (200, {"data": [{"id": "other"}, {"id": "scribe"}]}, "has it", "ok"),
        (200, {"data": [{"id": "other"}]}, "other models", "problem"),
        (200, {"data": [1]}, "no list", "ok"),
        (404, {}, "no list", "ok"),
        (401, {}, "refused", "problem"),
        (503, {}, "no answer", "warning"),
    ],
)
def test_the_llm_that_upsamples_prompts(
    tmp_path: Path, status: int, body: dict[str, Any], heard: str, state: str
) -> None:
    (tmp_path / "key").write_text("s3cret\n")

    def answer(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://llm.invalid/v1/models"
        assert request.headers["authorization"] == "Bearer s3cret"
        return httpx.Response(status, json=body)

    upsampling = Upsampling(url=LLM_URL, model="scribe", api_key_file=tmp_path / "key")
    found = probes.ask_upsampler(upsampling, "scribe", httpx.MockTransport(answer))
    assert found == heard
    judged = judge_upsampler(LLM_URL, "scribe", found)
    assert judged.state == state
    assert "s3cret" not in judged.said


def test_an_llm_without_its_key_or_its_server(tmp_path: Path) -> None:
    absent = Upsampling(url=LLM_URL, model="scribe", api_key_file=tmp_path / "key")
    assert probes.ask_upsampler(absent, "scribe") == "no key file"
    assert judge_upsampler(LLM_URL, "scribe", "no key file").state == "problem"
    closed = Upsampling(url="http://127.0.0.1:1/v1", model="scribe")
    assert probes.ask_upsampler(closed, "scribe") == "no answer"


def test_the_llm_of_a_config_is_looked_for(tmp_path: Path) -> None:
    own = {"model": "own"}
    args = GatewayArgs.model_validate(
        {
            "tiers": ["tiny", "tiny-tp2"],
            "upsampling": {"url": "http://127.0.0.1:1/v1", "model": "scribe"}
            | {"tiers": {"tiny": own}},
        }
    )
    [found] = doctor_module.examine_upsamplers([args, GatewayArgs(tiers=("tiny",))])
    assert (found.what, found.state) == ("upsampler", "warning")
    assert "127.0.0.1:1" in found.said


def test_the_clock_is_the_hubs(hub: FakeHub) -> None:
    date = hub_date()
    assert date is not None
    later = datetime.now(UTC) + timedelta(seconds=600)
    assert probes.clock_offset_s(date, later) == pytest.approx(600, abs=5)
    assert probes.clock_offset_s("no time", later) is None


def test_who_has_the_job_database_open(tmp_path: Path) -> None:
    path, processes = tmp_path / "jobs.sqlite3", tmp_path / "proc"
    for process, session in ((11, "session_a_1"), (12, "session_a_1"), (13, "session_b_2")):
        folder = processes / str(process) / "fd"
        folder.mkdir(parents=True)
        (folder / "3").symlink_to(f"/tmp/ray/{session}/logs/worker.out")
        (folder / "4").symlink_to(path if process != 12 else "/dev/null")
    (processes / "14" / "fd").mkdir(parents=True)
    (processes / "14" / "fd" / "0").symlink_to(path)
    found = probes.sessions_with(path, processes)
    assert found == ["process 14", "session_a_1", "session_b_2"]
    assert probes.database_path("postgresql://db") is None
    assert probes.database_path(f"sqlite:///{path}") == path


def test_ports() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert not probes.is_port_taken("0.0.0.0", port)
        listener.listen()
        assert probes.is_port_taken("0.0.0.0", port)
    assert not probes.answers_as_serve(f"http://127.0.0.1:{port}")


def test_an_exporter_is_imported_in_a_process_of_its_own() -> None:
    assert probes.import_error("json:dumps") is None
    assert "ModuleNotFoundError: No module named 'nowhere'" in str(probes.import_error("nowhere:x"))
    assert "AttributeError" in str(probes.import_error("json:nothing"))
    assert probes.output_of([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert probes.output_of(["/no/such/program"]) is None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A machine on which nothing is wrong; its environment can be changed."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor_module, "environment", lambda: variables)
    monkeypatch.setattr(probes, "torch_facts", lambda: torch())
    monkeypatch.setattr(probes, "driver_version", lambda: "580.1")
    monkeypatch.setattr(probes, "is_port_taken", lambda host, port: False)
    monkeypatch.setattr(probes, "shared_memory_bytes", lambda: 64 * GB)
    monkeypatch.setattr(probes, "open_files_limit", lambda: 65536)
    monkeypatch.setattr(probes, "compiler", lambda: "/usr/bin/cc")
    monkeypatch.setattr(probes, "sessions_with", lambda path: [])
    return variables


def invoke(*arguments: object) -> Any:
    words = ["doctor", *map(str, arguments), "--address", "http://127.0.0.1:9"]
    return CliRunner().invoke(app, words)


def test_nothing_is_wrong(machine: dict[str, str]) -> None:
    result = invoke(LAPTOP, "--json")
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert {check["state"] for check in checks} == {"ok"}
    assert len(checks) == 13


def test_a_problem_ends_it_with_1(machine: dict[str, str]) -> None:
    machine["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"] = "nowhere:exporter"
    result = invoke(LAPTOP)
    assert result.exit_code == 1
    (problem,) = [line for line in result.stdout.splitlines() if line.startswith("problem")]
    assert "tracing exporter: nowhere:exporter does not import" in problem
    assert "Serve would not start" in problem


def test_what_is_wrong_with_the_file_is_the_first_thing(
    machine: dict[str, str], tmp_path: Path
) -> None:
    config = yaml.safe_load(LAPTOP.read_text())
    config["applications"][1]["args"]["devise"] = "cpu"
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    result = invoke(path, "--json")
    assert result.exit_code == 1
    first = json.loads(result.stdout)["checks"][0]
    assert (first["what"], first["state"]) == ("serve.yaml", "problem")
    assert "application tiny: args.devise" in first["said"]


def test_http_options_that_are_no_map(machine: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("{http_options: 8000, applications: []}")
    result = invoke(path)
    assert (result.exit_code, "problem  serve.yaml: http_options: Input" in result.stdout) == (
        1,
        True,
    )
    assert "port 8000: free at 0.0.0.0" in result.stdout


def test_a_terminal_gets_a_table() -> None:
    console = Console(width=60, record=True, force_terminal=True)
    show([Diagnosis("clock", "problem", "it is [red] late")], console)
    text = console.export_text()
    assert "clock" in text and "it is [red] late" in text and "┃ state" in text


def test_the_machine_alone(machine: dict[str, str]) -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "driver and torch" in result.stdout
