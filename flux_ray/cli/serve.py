"""`flux-ray serve`: run a Serve config file on this machine, say when it is ready, and end it all.

`serve run` does the work, as a child process: it says nothing when the server is ready, and takes
SIGTERM for a crash. `make serve` calls this command.
"""

import os
import re
import signal
import subprocess  # nosec B404
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Any

import httpx
import typer
import yaml

from flux_ray.cli.client import fail
from flux_ray.cli.config_file import check_config, read_config
from flux_ray.cli.probes import is_port_taken, own_client
from flux_ray.config import environment_for_ray, read_http_options

LOOPBACK = ("127.0.0.1", "localhost", "::1")
GATEWAY = "flux_ray.app:build_gateway"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_S = 0.5
# A proxy holds probes until there is a gateway; one that is given up is a line in the log.
PROBE_S = 30.0
# A start that takes longer than this says why, again and again.
PATIENCE_S = 30.0
# Ray's processes end a moment after the one that started them.
LEFT_S = 15.0
ANSI = re.compile(r"\x1b\[[0-9;]*m")
DASHBOARD = re.compile(r"dashboard at (http://\S+)")


class ServeRun:
    """A `serve run` in a session of its own, so that Ctrl-C reaches it only through this process.

    Its output is passed on until it is told to stop; what Ray says while it is being ended would
    look like a crash.
    """

    def __init__(self, config: Path) -> None:
        command = [str(Path(sys.executable).with_name("serve")), "run", str(config)]
        self.process = subprocess.Popen(  # nosec B603
            command,
            # A Ray of its own: else it would join one that runs here, or wait in vain for one that
            # was killed and left its address.
            env={"RAY_ADDRESS": "local"} | environment_for_ray() | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.dashboard: str | None = None
        self._num_stops = 0
        assert self.process.stdout is not None
        # A daemon: what Ray left behind may hold the pipe open.
        self._reader = threading.Thread(target=self._pass_on, args=[self.process.stdout])
        self._reader.daemon = True
        self._reader.start()

    @property
    def is_stopping(self) -> bool:
        """Return whether it was told to stop."""
        return self._num_stops > 0

    def stop(self, *about: object) -> None:
        """End it as Ctrl-C does; kill it the second time. A handler of signals."""
        self._num_stops += 1
        if self._num_stops == 1:
            say("stopping: requests that are running may end; once more ends them too")
            self.process.send_signal(signal.SIGINT)
        else:
            self.kill()

    def kill(self) -> None:
        """Kill what is left of it, and of the Ray that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait until it has ended, Ray's processes included; return its exit status."""
        status = self.process.wait()
        end_s = time.monotonic() + LEFT_S
        while time.monotonic() < end_s and is_group(self.process.pid):
            time.sleep(0.1)
        self.kill()
        self._reader.join(1.0)
        return status

    def _pass_on(self, lines: IO[str]) -> None:
        is_terminal = sys.stdout.isatty()
        for line in lines:
            plain = ANSI.sub("", line)
            if found := DASHBOARD.search(plain):
                self.dashboard = found[1]
            if not self.is_stopping:
                say((line if is_terminal else plain).rstrip("\n"))


def is_group(group: int) -> bool:
    """Return whether a process of that group runs; zombies, whom nobody waits for, do not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        # It may have ended meanwhile.
        with suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state != "Z":
                return True
    return False


def say(line: str) -> None:
    """Print a line at once, whole: two threads do."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def changed(
    config: dict[str, Any], host: str | None, port: int | None, public_url: str | None
) -> dict[str, Any]:
    """Return the config with what the command line says instead.

    What is no map, and so wrong, stays as it is for the checks to find.
    """
    said = {"host": host, "port": port}
    options = config.get("http_options") or {}
    if isinstance(options, dict):
        said = {name: value for name, value in said.items() if value is not None}
        config = {**config, "http_options": {**options, **said}}
    if public_url is not None:
        applications = [with_url(each, public_url) for each in config["applications"]]
        config = {**config, "applications": applications}
    return config


def with_url(application: dict[str, Any], public_url: str) -> dict[str, Any]:
    """Return an application with that public URL, if it is a gateway."""
    args = application.get("args") or {}
    if application.get("import_path") != GATEWAY or not isinstance(args, dict):
        return application
    return {**application, "args": {**args, "public_url": public_url}}


@contextmanager
def file_of(path: Path, config: dict[str, Any], is_changed: bool) -> Iterator[Path]:
    """Yield the config's own file, or a temporary one with what was changed."""
    if not is_changed:
        yield path
        return
    with tempfile.NamedTemporaryFile("w", suffix=f"-{path.name}") as file:
        yaml.safe_dump(config, file)
        file.flush()
        yield Path(file.name)


def check_port(host: str, port: int) -> None:
    """End the command if something listens there: its answers would be taken for ours."""
    if is_port_taken(host, port):
        fail(f"something listens at port {port} already: stop it, or say PORT={port + 1}")


def start(config: Path) -> ServeRun:
    """Start it, and have the signals that end this process end it instead."""
    early: list[int] = []
    # Before it starts: a signal that this process ignores, as a shell's background jobs ignore
    # Ctrl-C, would be ignored by the child for good.
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: early.append(number))
    run = ServeRun(config)
    for number in SIGNALS:
        signal.signal(number, run.stop)
    if early:
        run.stop()
    return run


def watch(run: ServeRun, url: str) -> bool:
    """Wait until `/readyz` answers 200, and return True; False if it was stopped or has ended."""
    began_s = told_s = time.monotonic()
    with own_client(PROBE_S) as client:
        while run.process.poll() is None and not run.is_stopping:
            reason = reason_of(client, url)
            if reason is None:
                return True
            now_s = time.monotonic()
            if now_s - told_s > PATIENCE_S:
                told_s = now_s
                say(f"still starting after {now_s - began_s:.0f} s: {reason}")
            time.sleep(LOOK_S)
    return False


def reason_of(client: httpx.Client, url: str) -> str | None:
    """Return why the server is not ready, or None if it is."""
    try:
        answer = client.get(f"{url}/readyz")
        if answer.status_code == 200:
            return None
        return str(answer.json()["error"]["message"])
    except httpx.TransportError:
        return f"nothing answers at {url} yet"
    except (ValueError, KeyError, TypeError):
        return f"{url}/readyz answers {answer.status_code}"


def has_page(url: str) -> bool:
    """Return whether the gateway has a page for browsers."""
    with suppress(httpx.TransportError), own_client(5.0) as client:
        answer = client.get(url)
        return answer.status_code == 200 and "html" in answer.headers.get("content-type", "")
    return False


def ready_lines(url: str, host: str, dashboard: str | None, with_page: bool) -> list[str]:
    """Return what to print once the server is ready: where it is, and how to stop it."""
    lines = [f"ready: {url}"]
    if with_page:
        lines.append(f"  page       {url}/")
    lines.append(f"  API        {url}/v1 for OpenAI's clients; all routes: {url}/openapi.json")
    if dashboard is not None:
        lines.append(f"  dashboard  {dashboard} (its token: `ray get-auth-token`)")
    if host in LOOPBACK:
        lines.append(
            "  Only this machine reaches it. For others, or inside of a container:"
            " HOST=0.0.0.0 make serve"
        )
    return [*lines, "  Ctrl-C stops it."]


Config = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A Serve config file.")]


def serve(
    config: Config = Path("serve/laptop.yaml"),
    host: Annotated[
        str | None, typer.Option(help="Listen there instead of at http_options.host.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Instead of http_options.port.")
    ] = None,
    public_url: Annotated[
        str | None, typer.Option(help="The URL by which clients reach it, instead of the file's.")
    ] = None,
) -> None:
    """Serve CONFIG on this machine until Ctrl-C or SIGTERM, and say when it is ready.

    Exit status: 0 if it was stopped, 1 if it could not start or ended, 2 for wrong options.

    Example: flux-ray serve serve/one-gpu.yaml --public-url http://gpu.example.com:8000
    """
    values = changed(read_config(config), host, port, public_url)
    check_config(config, is_here=True, allow_others=True, config=values)
    options, _ = read_http_options(values)
    check_port(options.host, options.port)
    is_changed = (host, port, public_url) != (None, None, None)
    with file_of(config, values, is_changed) as file:
        run = start(file)
        url = options.url
        if watch(run, url):
            for line in ready_lines(url, options.host, run.dashboard, has_page(url)):
                say(line)
        status = run.wait()
    if run.is_stopping:
        say("stopped")
    elif status:
        fail(f"serve run ended with exit status {status}")
