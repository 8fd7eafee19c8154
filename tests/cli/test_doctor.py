"""`flux-ray doctor`: each judgement, each probe, and how the command ends."""

import json
import socket
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from flux_ray.cli import doctor as doctor_module
from flux_ray.cli import probes
from flux_ray.cli.diagnosis import (
    REMEDIES,
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
    judge_versions,
    judge_weights,
)
from flux_ray.cli.doctor import show
from flux_ray.cli.main import app

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


HUB_ID = "owner/name@abc"
ENVIRONMENT = {"HF_ENDPOINT": "http://hub", "HF_TOKEN": "secret"}


def hub(answer: Any, home: Path, **variables: str) -> probes.Hub:
    return probes.Hub(ENVIRONMENT | variables, home, httpx.MockTransport(answer))


@pytest.mark.parametrize(
    ("status", "code", "token", "found"),
    [
        (200, "", "secret", "to download"),
        (302, "", "secret", "to download"),
        (403, "GatedRepo", "secret", "gated"),
        (401, "GatedRepo", "", "no token"),
        (401, "RepoNotFound", "secret", "missing"),
        (404, "RevisionNotFound", "secret", "missing"),
        (404, "EntryNotFound", "secret", "to download"),
        (404, "", "secret", "missing"),
        (500, "", "secret", "unreachable"),
    ],
)
def test_what_the_hub_says_of_weights(
    status: int, code: str, token: str, found: str, tmp_path: Path
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://hub/owner/name/resolve/abc/model_index.json"
        assert request.headers.get("authorization") == (f"Bearer {token}" if token else None)
        return httpx.Response(status, headers={"x-error-code": code} if code else {})

    assert hub(answer, tmp_path, HF_TOKEN=token).find(HUB_ID) == found
    assert judge_weights("tiny", HUB_ID, found).state == REMEDIES[found][0]


def test_a_hub_that_is_silent_or_forbidden(tmp_path: Path) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    def never(request: httpx.Request) -> httpx.Response:
        raise AssertionError("it was asked")

    assert hub(refuse, tmp_path).find(HUB_ID) == "unreachable"
    assert hub(refuse, tmp_path).ask_time() is None
    assert hub(never, tmp_path, HF_HUB_OFFLINE="1").find(HUB_ID) == "unreachable"
    assert hub(never, tmp_path, HF_HUB_OFFLINE="1").ask_time() is None


def test_weights_that_are_here(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    folder = cache / "models--owner--name"
    for part in ("transformer", "vae", "text_encoder"):
        assert not probes.is_cached(cache, "owner/name", "abc")
        (folder / "snapshots" / "abc" / part).mkdir(parents=True)
        (folder / "snapshots" / "abc" / part / "model.safetensors").touch()
    assert probes.is_cached(cache, "owner/name", "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert probes.is_cached(cache, "owner/name", "main")
    never = hub(None, tmp_path, HF_HOME=str(tmp_path))
    assert never.find(HUB_ID) == "here"
    assert never.find(str(tmp_path)) == "here"
    assert never.find(str(tmp_path / "none")) == "missing"


def test_the_hubs_token_and_cache_are_found_where_its_library_finds_them(tmp_path: Path) -> None:
    assert probes.hub_token({}, tmp_path) is None
    kept = tmp_path / ".cache" / "huggingface" / "token"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept\n")
    assert probes.hub_token({}, tmp_path) == "kept"
    assert probes.hub_token({"HF_TOKEN": "told"}, tmp_path) == "told"
    assert probes.hub_token({"HF_HOME": str(tmp_path)}, tmp_path) is None
    assert probes.hub_cache({}, tmp_path) == kept.parent / "hub"
    assert probes.hub_cache({"HF_HUB_CACHE": "/c"}, tmp_path) == Path("/c")


def test_the_clock_is_the_hubs(tmp_path: Path) -> None:
    late = datetime.now(UTC) - timedelta(seconds=600)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"date": format_datetime(late, usegmt=True)})

    assert hub(answer, tmp_path).ask_time() == pytest.approx(600, abs=5)
    assert probes.clock_offset_s("no time", datetime.now(UTC)) is None


def test_how_much_is_downloaded() -> None:
    """The hub has 16 GB of klein-4b, 113 of dev."""
    assert probes.download_bytes("flux-2-klein-4b") == pytest.approx(16 * GB, rel=0.05)
    assert probes.download_bytes("flux-2-dev") == pytest.approx(113 * GB, rel=0.05)
    assert probes.download_bytes("flux-1-fill-dev") == pytest.approx(33.9 * GB, rel=0.05)


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
    assert not probes.answers_as_serve(port)


def test_an_exporter_is_imported_in_a_process_of_its_own() -> None:
    assert probes.import_error("json:dumps") is None
    assert "ModuleNotFoundError: No module named 'nowhere'" in str(probes.import_error("nowhere:x"))
    assert "AttributeError" in str(probes.import_error("json:nothing"))
    assert probes.output_of([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert probes.output_of(["/no/such/program"]) is None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A machine on which nothing is wrong; its environment can be changed."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t", "HF_HUB_OFFLINE": "1"}
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


def test_a_terminal_gets_a_table() -> None:
    console = Console(width=60, record=True, force_terminal=True)
    show([Diagnosis("clock", "problem", "it is [red] late")], console)
    text = console.export_text()
    assert "clock" in text and "it is [red] late" in text and "┃ state" in text


def test_the_machine_alone(machine: dict[str, str]) -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "driver and torch" in result.stdout
