"""HAProxy and nginx with the files of cluster/load_balancer/, in front of nodes of a test's own."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Their times for small steps of a node, which on a slow machine a healthy one may not keep.
SHORT = re.compile(r"(timeout (?:connect|queue|check)|proxy_connect_timeout) \d+s")
FOLDER = Path(__file__).parents[1] / "cluster" / "load_balancer"
HAPROXY = FOLDER / "haproxy.cfg"
NGINX = FOLDER / "nginx.conf"


@dataclass(frozen=True)
class Balancer:
    """A load balancer that runs, its address, and HAProxy's socket for commands."""

    process: subprocess.Popen[bytes]
    url: str
    commands: Path

    def command(self, line: str) -> str:
        """Return HAProxy's answer to one line of its command socket."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.commands))
            connection.sendall(f"{line}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def haproxy_config(ports: Sequence[int]) -> str:
    """Return the repository's file with these ports of 127.0.0.1 in the place of its nodes."""
    text = HAPROXY.read_text()
    (nodes,) = re.findall(r"^ +\.if defined\(FLUX_RAY_NODE\)\n.*?\.endif\n", text, re.M | re.S)
    return text.replace(nodes, "".join(f"    server n{p} 127.0.0.1:{p}\n" for p in ports))


def nginx_config(folder: Path, port: int, ports: Sequence[int]) -> str:
    """Return the repository's file for these nodes, with a folder of its own for what it writes."""
    text = NGINX.read_text().replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    nodes = re.findall(r"^ +server 10\.\S+ (?P<rest>.*)\n", text, re.M)
    first = re.search(r"^ +server 10\..*\n", text, re.M)
    assert first and len(set(nodes)) == 1
    lines = "".join(f"        server 127.0.0.1:{each} {nodes[0]}\n" for each in ports)
    text = re.sub(r"^ +server 10\..*\n", "", text, flags=re.M)
    text = text[: first.start()] + lines + text[first.start() :]
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    own = "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    return f"pid {folder}/pid;\nerror_log stderr;\n" + text.replace(
        "http {\n", f"http {{\n{own}", 1
    )


@contextmanager
def running(command: Sequence[object], env: dict[str, str], url: str) -> Iterator[Balancer]:
    """Run a load balancer in the foreground, and kill it at the end."""
    process = subprocess.Popen(
        [str(word) for word in command], env=os.environ | env, stdout=sys.stderr
    )
    try:
        yield Balancer(process, url, Path(env.get("FLUX_RAY_STATS", "")))
    finally:
        process.kill()
        process.wait()


def patient(text: str) -> str:
    """Return a configuration that waits a minute where the repository's waits some seconds."""
    return SHORT.sub(r"\1 60s", text)


@contextmanager
def haproxy(
    folder: Path, port: int, ports: Sequence[int], *, is_patient: bool = False
) -> Iterator[Balancer]:
    """Run HAProxy on `port` in front of `ports`, all of 127.0.0.1."""
    path = folder / "haproxy.cfg"
    text = haproxy_config(ports)
    path.write_text(patient(text) if is_patient else text)
    env = {"FLUX_RAY_BIND": f"127.0.0.1:{port}", "FLUX_RAY_STATS": str(folder / "admin.sock")}
    with running(["haproxy", "-f", path], env, f"http://127.0.0.1:{port}") as balancer:
        yield balancer


@contextmanager
def nginx(
    folder: Path, port: int, ports: Sequence[int], *, is_patient: bool = False
) -> Iterator[Balancer]:
    """Run nginx on `port` in front of `ports`, all of 127.0.0.1."""
    path = folder / "nginx.conf"
    text = nginx_config(folder, port, ports)
    path.write_text(patient(text) if is_patient else text)
    command = ["nginx", "-c", path, "-g", "daemon off;"]
    with running(command, {}, f"http://127.0.0.1:{port}") as balancer:
        yield balancer
