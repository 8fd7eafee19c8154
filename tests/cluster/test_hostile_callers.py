"""While hostile callers send each kind of attack in hostile.py, others are served as before."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx
import psutil
import pytest
import yaml

from tests.cluster.conftest import LAPTOP, PATIENCE_S, free_port, is_ready, serve_run, wait_until
from tests.cluster.hostile import KINDS, Hostile, noise, plain
from tests.cluster.test_make_serve import environment_of_serve

# How much longer others may wait than the longest wait without hostile callers, on a quiet machine.
MAX_EXTRA_S = 1.0
# What the gateway or the proxy may use, whatever the attack: bodies and images have a budget.
MAX_MEGABYTES = 1500
NUM_BASELINE_ROUNDS = 8
# The limit for an answer to a complete request, or for the end of the connection.
ANSWER_S = 40.0
# What the command lines of Ray's processes begin with.
PROCESSES = {"gateway": "ray::ServeReplica:gateway", "proxy": "ray::ProxyActor"}


class Server(NamedTuple):
    """A running server: its address, and the process that started all others."""

    address: str
    process: psutil.Popen


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run serve/laptop.yaml with one tier, as `make serve` starts it."""
    folder = tmp_path_factory.mktemp("hostile")
    config = yaml.safe_load(LAPTOP.read_text())
    port = config["http_options"]["port"] = free_port()
    config["applications"] = config["applications"][:2]
    config["applications"][0]["args"] |= {"tiers": ["tiny"], "public_url": "http://127.0.0.1"}
    path = folder / "hostile.yaml"
    path.write_text(yaml.safe_dump(config))
    address = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_of_serve(folder).items():
            if name.startswith(("RAY_SERVE_", "FORWARDED_", "MALLOC_")):
                patch.setenv(name, value)
        with serve_run(path, folder) as serve:
            wait_until(lambda: is_ready(address), timeout_s=PATIENCE_S, what="a tier that serves")
            yield Server(address, serve)


class Probes:
    """A friendly client that asks for one thing after the other, and measures the longest waits."""

    def __init__(self, address: str) -> None:
        image = ("a.png", noise("PNG"), "image/png")
        words = {"model": "tiny", "prompt": "a ring", "size": "64x64"}
        # Without keys, callers are told apart by their addresses: this is another caller.
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        self._http = httpx.Client(base_url=address, timeout=PATIENCE_S, transport=transport)
        self._asks: dict[str, Callable[[], httpx.Response]] = {
            "/health": lambda: self._http.get("/health"),
            "/readyz": lambda: self._http.get("/readyz"),
            "image": lambda: self._http.post(
                "/v1/images/generations",
                content=plain(),
                headers={"content-type": "application/json"},
            ),
            "edit": lambda: self._http.post("/v1/images/edits", data=words, files={"image": image}),
        }

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def worst_s(self, is_over: Callable[[], bool]) -> dict[str, float]:
        """Return the longest wait for each thing, asked until `is_over()` and at least once."""
        worst = dict.fromkeys(self._asks, 0.0)
        while True:
            for name, ask in self._asks.items():
                began_s = time.monotonic()
                answer = ask()
                worst[name] = max(worst[name], time.monotonic() - began_s)
                assert answer.status_code == 200, f"{name}: {answer.text[:200]}"
            if is_over():
                return worst


async def answer_to(address: str, hostile: Hostile, pieces: list[bytes]) -> str:
    """Return the most frequent outcome of its connections: a status, or closed, or left open."""
    url = httpx.URL(address)
    answers = await asyncio.gather(
        *(
            on_connection(url.host, url.port, pieces, hostile.pause_s)
            for _ in range(hostile.num_connections)
        )
    )
    return max(set(answers), key=answers.count)


async def on_connection(host: str, port: int | None, pieces: list[bytes], pause_s: float) -> str:
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return "refused"
    answer = asyncio.create_task(reader.read(100))
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if pause_s:
                await asyncio.wait({answer}, timeout=pause_s)
            if answer.done():
                break
        patience_s = 1.0 if pause_s else ANSWER_S
        began = (await asyncio.wait_for(answer, patience_s)).decode("latin-1")
        return began[9:12] or "closed"
    except TimeoutError:
        return "open"
    except OSError:
        return "closed"
    finally:
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        writer.close()


@contextmanager
def sending(address: str, hostile: Hostile) -> Iterator[tuple[threading.Thread, list[str]]]:
    """Send an attack on a thread of its own during the `with`."""
    answers: list[str] = []
    # Made in advance: the friendly client is in this process, and would wait for it.
    pieces = list(hostile.pieces())
    thread = threading.Thread(
        target=lambda: answers.append(asyncio.run(answer_to(address, hostile, pieces)))
    )
    thread.start()
    try:
        yield thread, answers
    finally:
        thread.join()


def megabytes(serve: psutil.Popen) -> dict[str, float]:
    """Return the resident megabytes of the processes that read callers' bytes."""
    sizes = dict.fromkeys(PROCESSES, 0.0)
    for process in serve.children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            for name, begins in PROCESSES.items():
                if command.startswith(begins):
                    sizes[name] += process.memory_info().rss / 1e6
        except psutil.NoSuchProcess:
            continue
    return sizes


class Without(NamedTuple):
    """The waits and the memory without hostile callers."""

    probes: Probes
    worst_s: dict[str, float]
    megabytes: dict[str, float]


@pytest.fixture(scope="module")
def without(server: Server) -> Iterator[Without]:
    """Measure once on the same server, and print the head of a table."""
    probes = Probes(server.address)
    rounds = iter(range(NUM_BASELINE_ROUNDS))
    worst_s = probes.worst_s(lambda: next(rounds, None) is None)
    before = megabytes(server.process)
    told = [f"{name} {each:.2f}" for name, each in worst_s.items()]
    print(f"\nwithout: {', '.join(told)}; seconds more, and megabytes more, are:")
    print(f"{'kind':34} {'answer':7}" + "".join(f"{name:>8}" for name in (*worst_s, *before)))
    yield Without(probes, worst_s, before)
    probes.close()


@pytest.mark.drill
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_for_hostile_callers(server: Server, without: Without, kind: str) -> None:
    with sending(server.address, KINDS[kind]) as (thread, answers):
        worst_s = without.probes.worst_s(lambda: not thread.is_alive())
    after = megabytes(server.process)
    extra_s = {name: worst_s[name] - usual_s for name, usual_s in without.worst_s.items()}
    grown = {name: after[name] - usual for name, usual in without.megabytes.items()}
    row = [f"{each:8.2f}" for each in extra_s.values()] + [
        f"{each:8.0f}" for each in grown.values()
    ]
    print(f"{kind:34} {answers[0]:7}" + "".join(row))
    assert max(extra_s.values()) <= MAX_EXTRA_S
    assert max(grown.values()) <= MAX_MEGABYTES
