"""`flux-ray serve`: what it refuses and warns of before it starts, and how it ends."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
import typer
import yaml
from typer.testing import CliRunner

from flux_ray.cli.config_file import check_config
from flux_ray.cli.main import app
from flux_ray.cli.probes import answers_as_serve
from flux_ray.cli.serve import ANSI, changed, ready_lines
from tests.listening import free_port

ROOT = Path(__file__).parents[2]
LAPTOP = ROOT / "serve" / "laptop.yaml"
# In the place of Serve's command: it says what Ray says, answers probes, and ends on SIGINT as
# `serve run` does, which prints a trace that nobody wants to see.
SERVE_RUN = """\
import http.server, os, signal, ssl, subprocess, sys, time, yaml
print("\\033[36mINFO\\033[39m View the dashboard at \\033[1mhttp://127.0.0.1:8299 \\033[0m")
config = yaml.safe_load(open(sys.argv[2]))
child = subprocess.Popen(["sleep", "300"])
told = os.environ["RAY_AUTH_MODE"], os.environ["RAY_ADDRESS"]
open("started", "w").write(f"{child.pid} {told[0]} {told[1]}")
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if Handler.asked > 2 else 503)
        self.send_header("content-type", "text/html")
        self.end_headers()
    def log_message(self, *about):
        pass
options = config["http_options"]
server = http.server.HTTPServer((options["host"], options["port"]), Handler)
if "tls" in os.environ:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(options["ssl_certfile"], options["ssl_keyfile"])
    server.socket = tls.wrap_socket(server.socket, server_side=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    print("Traceback (most recent call last): KeyboardInterrupt")
    if "stays" not in os.environ:
        child.kill()
    if "slow" in os.environ:
        time.sleep(300)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that runs the command with SERVE_RUN beside its Python."""
    (tmp_path / "python").symlink_to(sys.executable)
    serve = tmp_path / "serve"
    serve.write_text(f"#!{sys.executable}\n{SERVE_RUN}")
    serve.chmod(serve.stat().st_mode | stat.S_IXUSR)

    def run(*options: str, config: Path = LAPTOP, **env: str) -> subprocess.Popen[str]:
        code = (
            f"import sys; sys.executable = {str(tmp_path / 'python')!r};"
            # What stays is not to be waited for as long as a Ray that ends.
            "from flux_ray.cli import serve; serve.LEFT_S = 1.0;"
            "from flux_ray.cli.main import app; app()"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, "serve", str(config), *options],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # As a shell starts what it runs in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )

    return run


def read_until(run: "subprocess.Popen[str]", words: str) -> list[str]:
    assert run.stdout is not None
    lines: list[str] = []
    for line in run.stdout:
        lines.append(line.rstrip("\n"))
        if words in line:
            return lines
    raise AssertionError(lines)


def is_alive(pid: int) -> bool:
    """Return whether it runs; what nobody has waited for is a zombie."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("number", "env"), [(signal.SIGINT, {}), (signal.SIGTERM, {"stays": "a child of it"})]
)
def test_it_says_when_it_is_ready_and_leaves_nothing(
    start: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
    number: signal.Signals,
    env: dict[str, str],
) -> None:
    port = free_port()
    run = start("--port", str(port), **env)
    lines = read_until(run, "Ctrl-C")
    assert lines.count(f"ready: http://127.0.0.1:{port}") == 1
    text = "\n".join(lines)
    assert f"page       http://127.0.0.1:{port}/" in text
    assert "dashboard  http://127.0.0.1:8299" in text
    assert "HOST=0.0.0.0 make serve" in text
    # No colours: this is no terminal.
    assert not ANSI.search(text) and "INFO View the dashboard" in text
    pid, *told = (tmp_path / "started").read_text().split()
    assert told == ["token", "local"]
    run.send_signal(number)
    rest, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    assert rest.splitlines()[-1] == "stopped" and "Traceback" not in rest
    assert not is_alive(int(pid))


def test_a_server_with_a_certificate_is_asked_by_https(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """It is of the name that clients know, and perhaps of an authority of their own."""
    config, port = yaml.safe_load(LAPTOP.read_text()), free_port()
    certificate = trustme.CA().issue_cert("flux.example.com")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    config["http_options"] |= {"port": port, "ssl_keyfile": "key.pem", "ssl_certfile": "cert.pem"}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    run = start(config=tmp_path / "serve.yaml", tls="1")
    text = "\n".join(read_until(run, "Ctrl-C"))
    assert f"ready: https://127.0.0.1:{port}\n" in text
    assert f"page       https://127.0.0.1:{port}/" in text
    assert answers_as_serve(f"https://127.0.0.1:{port}")
    assert not answers_as_serve(f"http://127.0.0.1:{port}")
    run.terminate()
    run.communicate(timeout=60)


def test_the_second_signal_does_not_wait(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    run = start("--port", str(free_port()), slow="1")
    read_until(run, "Ctrl-C")
    began_s = time.monotonic()
    run.send_signal(signal.SIGTERM)
    read_until(run, "stopping")
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 0 and time.monotonic() - began_s < 60
    assert not is_alive(int((tmp_path / "started").read_text().split()[0]))


def test_a_port_that_is_taken_is_named(start: Callable[..., "subprocess.Popen[str]"]) -> None:
    """Else the other server's answers would be taken for ours."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start("--port", str(port))
        text, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert text.strip() == (
        f"error: something listens at port {port} already: stop it, or say PORT={port + 1}"
    )


def test_a_server_without_keys_for_everybody_is_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = ROOT / "serve" / "one-gpu.yaml"
    told = yaml.safe_load(path.read_text())
    for host, is_warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        config = changed(told, host, None, "https://flux.example.com")
        check_config(path, is_here=True, config=config)
        said = capsys.readouterr().err
        assert ("http_options.host" in said and "keys_file" in said) == is_warned
        assert said.count("\n") == is_warned


def test_an_address_that_only_stands_for_one_is_not_served(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = ROOT / "serve" / "one-gpu.yaml"
    with pytest.raises(typer.Exit):
        check_config(path, is_here=True)
    said = capsys.readouterr().err
    place = "application gateway: args.public_url: https://flux.invalid"
    assert said.startswith(f"error: {path}: {place}")
    assert "PUBLIC_URL=" in said and said.count("\n") == 1


def test_what_the_command_line_says_counts() -> None:
    config = changed(yaml.safe_load(LAPTOP.read_text()), "0.0.0.0", 81, "http://gpu:81")
    assert (config["http_options"]["host"], config["http_options"]["port"]) == ("0.0.0.0", 81)
    assert config["http_options"]["request_timeout_s"] == 630
    gateway, *tiers = config["applications"]
    assert gateway["args"]["public_url"] == "http://gpu:81"
    assert tiers == yaml.safe_load(LAPTOP.read_text())["applications"][1:]


@pytest.mark.parametrize("args", [None, {}])
def test_a_public_url_for_a_gateway_without_args(args: dict[str, str] | None) -> None:
    gateway = {"name": "gateway", "import_path": "flux_ray.app:build_gateway", "args": args}
    config = changed({"applications": [gateway]}, None, None, "http://gpu:81")
    assert config["applications"][0]["args"] == {"public_url": "http://gpu:81"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"http_options": 8000, "applications": []}, "http_options: Input should be a valid"),
        ({"http_options": {"port": "x"}, "applications": []}, "http_options.port: Input should be"),
        (
            {
                "applications": [
                    {"name": "gateway", "import_path": "flux_ray.app:build_gateway", "args": 3}
                ]
            },
            "application gateway: args: Input should be a valid",
        ),
    ],
)
def test_what_is_no_map_is_said(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    words = ["serve", str(path), "--host", "127.0.0.1", "--public-url", "http://gpu:81"]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert f"error: {path}: {said}" in result.stderr


def test_a_server_for_everybody_is_not_said_to_be_for_this_machine() -> None:
    text = "\n".join(ready_lines("http://127.0.0.1:80", "0.0.0.0", None, with_page=False))
    assert "HOST=" not in text and "page" not in text and "dashboard" not in text
