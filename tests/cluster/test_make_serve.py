"""What `make serve` sets for Serve, on a Serve of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flux_ray.catalog.tiers import TIERS
from flux_ray.config.gateway import Limits
from flux_ray.config.tier import PROXY_CALLBACK, RAY_SETTINGS, READ_WITH_H11
from tests.cluster.conftest import PATIENCE_S, ROOT, free_port

THROUGH_PROXY = Path(__file__).with_name("through_proxy.py")
NUM_BYTES = 16_000_000


def words_of_serve(folder: Path, *said: str) -> list[str]:
    """Return the arguments that `make serve` gives its command."""
    command = folder / "flux-ray"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    make = ["make", "--silent", "-o", ".venv/serve.stamp", "serve", f"BIN={folder}", *said]
    env = {name: value for name, value in os.environ.items() if name not in SAID}
    done = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, check=True, text=True)
    return done.stdout.split()


SAID = ("CONFIG", "HOST", "PORT", "PUBLIC_URL")


def test_what_is_said_to_make_is_said_to_the_command(tmp_path: Path) -> None:
    assert words_of_serve(tmp_path) == ["serve", "serve/laptop.yaml"]
    said = ("CONFIG=a.yaml", "HOST=0.0.0.0", "PORT=80", "PUBLIC_URL=http://gpu:80")
    options = ["--host", "0.0.0.0", "--port", "80", "--public-url", "http://gpu:80"]
    assert words_of_serve(tmp_path, *said) == ["serve", "a.yaml", *options]


def test_the_command_has_the_same_settings_as_make() -> None:
    """`flux-ray serve` is also called where there is no make, as in a container."""
    makefile = (ROOT / "Makefile").read_text()
    settings = dict(re.findall(r"^serve: export (\w+) \?= ?(.*)$", makefile, re.M))
    (auth_mode,) = re.findall(r"^RAY_AUTH_MODE \?= (\w+)$", makefile, re.M)
    assert settings | {"RAY_AUTH_MODE": auth_mode} == RAY_SETTINGS


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return environment_of_serve(tmp_path)


def environment_of_serve(folder: Path) -> dict[str, str]:
    """Return the environment that `make serve` gives its command, by a script in its place."""
    serve = folder / "flux-ray"
    serve.write_text("#!/bin/sh\nexec env -0\n")
    serve.chmod(0o755)
    command = ["make", "--silent", "-o", ".venv/serve.stamp", "serve", f"BIN={folder}"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return dict(line.split("=", 1) for line in told.split("\0") if "=" in line)


def test_the_largest_answer_is_within_serves_limit(environment: dict[str, str]) -> None:
    """It has all images that a request may ask for, as large as they get; the limit is near it."""
    largest = max(tier.max_pixels for tier in TIERS) * 3 * Limits().max_images * 4 // 3
    limit = int(environment["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"])
    assert 1.1 * largest < limit < 2 * largest


def test_nobodys_word_is_taken_for_where_a_request_comes_from(environment: dict[str, str]) -> None:
    """By default uvicorn believes `X-Forwarded-For` from anybody on this machine."""
    assert environment["FORWARDED_ALLOW_IPS"] == ""


def test_a_dead_proxy_is_noticed_soon(environment: dict[str, str]) -> None:
    """It takes three checks, and by default Serve's are ten seconds apart."""
    assert float(environment["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"]) <= 1
    assert float(environment["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"]) <= 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Run the script, which starts a Serve of its own in that environment, once for both tests."""
    environment = environment_of_serve(tmp_path_factory.mktemp("serve"))
    assert environment[PROXY_CALLBACK] == READ_WITH_H11
    assert environment["RAY_SERVE_PROXY_USE_GRPC"] == "1"
    return subprocess.run(
        [sys.executable, str(THROUGH_PROXY), str(free_port()), str(NUM_BYTES)],
        env=environment | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_request_that_offers_to_upgrade_keeps_its_body(
    run: subprocess.CompletedProcess[str],
) -> None:
    """Every JDK's HttpClient offers this. Headers without an end are refused."""
    assert "upgrade offered: 200 20" in run.stdout, run.stderr[-2000:]
    assert "endless headers: refused" in run.stdout, run.stderr[-2000:]


def test_answers_of_many_megabytes_arrive(run: subprocess.CompletedProcess[str]) -> None:
    """Eight images in one answer are so large; gRPC would fail on them with its default limit."""
    assert f"large answer: 200 {NUM_BYTES}" in run.stdout, run.stderr[-2000:]
