"""A hub on a local port: the routes that huggingface_hub uses, and the ways in which they fail."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

REPOSITORY, COMMIT = "owner/name", "a" * 40
TREE = re.compile(rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)")
RESOLVE = re.compile(rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class FakeHub:
    """One repository with one commit.

    `is_gated`: its files are refused to everybody. `num_cuts`: so many downloads of a large file
    end after half of what they would send. `requests`: each as `METHOD path`; `ranges`: the header
    of those that ask for a part.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.is_gated = False
        self.num_cuts = 0
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.address = ""

    def is_large(self, path: str) -> bool:
        return path.endswith(".safetensors")

    def etag(self, path: str) -> str:
        data = self.files[path]
        if self.is_large(path):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def row(self, path: str) -> dict[str, object]:
        """As `tree` lists the file; a large one is a pointer, with another id than its data."""
        data = self.files[path]
        row: dict[str, object] = {"type": "file", "path": path, "size": len(data)}
        if not self.is_large(path):
            return row | {"oid": self.etag(path)}
        lfs = {"oid": self.etag(path), "size": len(data), "pointerSize": 134}
        return row | {"oid": hashlib.sha1(path.encode()).hexdigest(), "lfs": lfs}


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path == "/":
            self.answer(200, {}, b"")
        elif match := TREE.fullmatch(path):
            self.tree(match["revision"])
        elif match := RESOLVE.fullmatch(path):
            self.resolve(match["path"])
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def tree(self, revision: str) -> None:
        if revision != COMMIT:
            self.refuse(404, "RevisionNotFound")
            return
        rows = json.dumps([self.hub.row(path) for path in self.hub.files]).encode()
        self.answer(200, {"Content-Type": "application/json"}, rows)

    def resolve(self, path: str) -> None:
        if self.hub.is_gated:
            self.refuse(403, "GatedRepo")
            return
        data, etag = self.hub.files[path], self.hub.etag(path)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.hub.is_large(path):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"'}
        if part := self.headers.get("range"):
            self.hub.ranges.append(part)
            first = int(re.fullmatch(r"bytes=(\d+)-\d*", part)[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.answer(206, headers, data[first:])
        elif self.hub.num_cuts and self.command == "GET" and self.hub.is_large(path):
            self.hub.num_cuts -= 1
            self.answer(200, headers, data, num_sent=len(data) // 2)
            self.close_connection = True
        else:
            self.answer(200, headers, data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def answer(
        self, status: int, headers: Mapping[str, str], body: bytes, num_sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:num_sent])

    def log_message(self, *_: object) -> None:
        """Write nothing: the requests are kept."""


@contextmanager
def serve_hub(files: Mapping[str, bytes]) -> Iterator[FakeHub]:
    hub = FakeHub(files)
    handler = type("Handler", (HubHandler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Send huggingface_hub of this process there, without a token, with a cache of its own.

    It reads the environment when it is imported, so that it is too late for that here.
    """
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
