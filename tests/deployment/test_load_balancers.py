"""A real HAProxy and a real nginx, with our files, in front of small servers in Serve's place."""

import asyncio
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from itertools import repeat
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flux_ray.config.gateway import Limits
from tests.balancers import HAPROXY, NGINX, Balancer, haproxy, nginx
from tests.listening import listening

PATIENCE_S = 60
Started = Callable[..., AbstractContextManager[Balancer]]


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(program) is None, reason=f"needs {program}: apt-get install {program}"
    )


HAPROXY_ONLY = pytest.param(haproxy, marks=needs("haproxy"), id="haproxy")
BOTH = [HAPROXY_ONLY, pytest.param(nginx, marks=needs("nginx"), id="nginx")]


class Node:
    """A server that answers as Serve's proxy of a node does, and says what reached it."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.is_waiting = asyncio.Event()
        self.paths: Counter[str] = Counter()
        ready = ("/-/healthz", "/readyz")
        routes = [Route(path, self.ready) for path in ready]
        routes += [Route("/echo", self.echo, methods=["POST"]), Route("/events", self.events)]
        self.application = Starlette(routes=routes)

    async def ready(self, request: Request) -> Response:
        return Response("success")

    async def echo(self, request: Request) -> Response:
        self.paths["/echo"] += 1
        body = await request.body()
        return JSONResponse({"num_bytes": len(body), "headers": dict(request.headers)})

    async def events(self, request: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            for number in range(3):
                yield f"data: {number}\n\n".encode()
                self.is_waiting.set()
                await self.go_on.wait()
                self.go_on.clear()

        return StreamingResponse(stream(), media_type="text/event-stream")


@asynccontextmanager
async def serving(node: Node) -> AsyncIterator[int]:
    """Serve the node on a free port of 127.0.0.1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(node.application, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task


async def give_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer probes as a node that is well; close the connection on any other request."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b"/readyz" in head or b"/-/healthz" in head:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
    else:
        GIVEN_UP.append(head)
    writer.close()


GIVEN_UP: list[bytes] = []


@pytest.fixture(autouse=True)
def _nothing_given_up() -> Iterator[None]:
    GIVEN_UP.clear()
    yield


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def asking(balancer: Balancer) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the load balancer, once that passes requests on."""
    client = httpx.AsyncClient(base_url=balancer.url, timeout=PATIENCE_S, trust_env=False)
    async with client as http:
        await until(lambda: is_ready(http))
        yield http


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        for pause_s in repeat(0.05):
            if await condition():
                return
            await asyncio.sleep(pause_s)


async def is_ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/readyz")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["haproxy", "-c", "-f", HAPROXY], marks=needs("haproxy"), id="haproxy"),
        pytest.param(["nginx", "-t", "-q", "-c", NGINX], marks=needs("nginx"), id="nginx"),
    ],
)
def test_the_file_as_it_is_is_valid(command: list[object], tmp_path: Path) -> None:
    if command[0] == "nginx":
        command += ["-g", f"pid {tmp_path}/pid; error_log stderr;"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stdout + done.stderr).lower()


@pytest.mark.parametrize("start", BOTH)
async def test_what_passes_and_what_does_not(start: Started, port: int, tmp_path: Path) -> None:
    """One load balancer of each kind shows all of it: starting one is what takes time."""
    node = Node()
    async with serving(node) as at:
        with start(tmp_path, port, [at], is_patient=True) as balancer:
            async with asking(balancer) as http:
                await a_large_form_passes(http)
                await headers_are_as_they_should_be(http)
                await a_body_beyond_the_limit_is_refused(http)
                await events_pass_one_by_one(http, node)


async def a_large_form_passes(http: httpx.AsyncClient) -> None:
    image = b"\x89PNG" + bytes(18_000_000)
    answer = await http.post("/echo", data={"prompt": "x"}, files={"image": ("a.png", image)})
    assert answer.status_code == 200
    assert answer.json()["num_bytes"] > len(image)


async def headers_are_as_they_should_be(http: httpx.AsyncClient) -> None:
    sent = {
        "host": "images.example.org",
        "x-request-timeout-seconds": "0.05",
        "x-flux-deadline-s": "8",
        "x-request-id": "the-client-s",
    }
    got = (await http.post("/echo", headers=sent)).json()["headers"]
    assert "x-request-timeout-seconds" not in got
    assert got["host"] == "images.example.org"
    assert got["x-flux-deadline-s"] == "8"
    assert got["x-request-id"] == "the-client-s"
    assert got["x-forwarded-for"] == "127.0.0.1"
    first, second = [(await http.post("/echo")).json()["headers"] for _ in range(2)]
    assert len(first["x-request-id"]) >= 32
    assert first["x-request-id"] != second["x-request-id"]


async def a_body_beyond_the_limit_is_refused(http: httpx.AsyncClient) -> None:
    """In the shape of the gateways' own errors, and after the first piece of the body."""
    reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    length = Limits().max_body_bytes + 1
    writer.write(f"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n".encode())
    writer.write(bytes(20_000))
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 413 " in head.splitlines()[0]
    assert b"content-type: application/json" in head.lower()
    assert b'"code":"request_too_large"' in await reader.readuntil(b"}}")
    writer.close()


async def events_pass_one_by_one(http: httpx.AsyncClient, node: Node) -> None:
    """The next event is made only when the one before it has arrived."""
    async with http.stream("GET", "/events") as answer:
        got = []
        async for line in answer.aiter_lines():
            if line:
                got.append(line)
                node.go_on.set()
    assert got == ["data: 0", "data: 1", "data: 2"]


@pytest.mark.parametrize("start", BOTH)
async def test_a_node_that_refuses_connections_fails_nobody(
    start: Started, port: int, tmp_path: Path
) -> None:
    node, gone = Node(), Node()
    async with serving(node) as at:
        async with serving(gone) as dead:
            pass
        with start(tmp_path, port, [dead, at], is_patient=True) as balancer:
            async with asking(balancer) as http:
                answers = [await http.post("/echo", content=b"x") for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 6


@pytest.mark.parametrize("start", BOTH)
async def test_a_node_that_breaks_off_a_request(start: Started, port: int, tmp_path: Path) -> None:
    """HAProxy sends it to another node. nginx does not, as its file says."""
    node = Node()
    async with serving(node) as at, listening(give_up) as breaking:
        with start(tmp_path, port, [breaking, at], is_patient=True) as balancer:
            async with asking(balancer) as http:
                answers = [await http.post("/echo", content=b"x") for _ in range(6)]
    assert GIVEN_UP
    statuses = Counter(answer.status_code for answer in answers)
    if start is haproxy:
        assert statuses == {200: 6}
        ids = [answer.json()["headers"]["x-request-id"] for answer in answers]
        assert any(each.encode() in head for each in ids for head in GIVEN_UP), "not the same id"
    else:
        assert statuses[502] > 0
        assert "It sends a request that was begun to no other node" in NGINX.read_text()


@needs("haproxy")
async def test_a_node_is_taken_out_by_hand_and_put_back(port: int, tmp_path: Path) -> None:
    one, other = Node(), Node()
    async with serving(one) as at_one, serving(other) as at_other:
        with haproxy(tmp_path, port, [at_one, at_other], is_patient=True) as balancer:
            async with asking(balancer) as http:
                assert balancer.command(f"set server proxies/n{at_one} state drain").strip() == ""
                one.paths.clear()
                for _ in range(4):
                    assert (await http.post("/echo")).status_code == 200
                assert (one.paths["/echo"], other.paths["/echo"]) == (0, 4)
                balancer.command(f"set server proxies/n{at_one} state ready")
                async with asyncio.timeout(PATIENCE_S):
                    while not one.paths["/echo"]:
                        assert (await http.post("/echo")).status_code == 200


@needs("haproxy")
async def test_it_ends_when_its_last_request_has(port: int, tmp_path: Path) -> None:
    """SIGUSR1, the `stop_signal` of compose.yaml: nothing new comes in, what has begun ends."""
    node = Node()
    async with serving(node) as at:
        with haproxy(tmp_path, port, [at], is_patient=True) as balancer:
            async with asking(balancer) as http, http.stream("GET", "/events") as answer:
                await node.is_waiting.wait()
                balancer.process.send_signal(signal.SIGUSR1)
                await until(lambda: refuses(port))
                assert balancer.process.poll() is None
                got = []
                async for line in answer.aiter_lines():
                    if line:
                        got.append(line)
                        node.go_on.set()
            assert got == ["data: 0", "data: 1", "data: 2"]
            ended = await asyncio.to_thread(balancer.process.wait, PATIENCE_S)
            assert ended == 0


async def refuses(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return True
    writer.close()
    return False
