"""Measure the CPU time of a request in each process, ours beside plain Ray Serve.

Wall time depends on what else runs on the machine, CPU time hardly does. If all cores are busy, the
sum over the processes limits the requests per second. What a process spends without requests, on
health checks and metrics, is left out: the slower way would have more of it for each request.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

# This module sets the environment of `make serve`, which has to happen before Ray is imported.
from tests.bench.serving_tax import (  # isort: skip
    CONCURRENCY,
    NUM_FAKES,
    FakeEngine,
    GatewayArgs,
    build_gateway,
    fake_tier,
    plain_serve,
    rate,
    serve,
    start_serve,
)

import psutil
import ray
from rich.console import Console
from rich.table import Table

BURST_S = 8.0
NUM_BURSTS = 3
# Seconds of requests that do not count, in which connections are opened and prices learned.
WARM_S = 2.0
Seconds = dict[str, float]
# The table's name for a process is that of the first entry found in its command line.
NAMES = (
    ("ProxyActor", "proxy"),
    ("ServeReplica:gateway", "gateway"),
    ("ServeReplica:plain", "plain replicas"),
    ("ServeReplica:tiny", "leaders"),
    ("LedgerActor", "ledger"),
    ("ServeController", "controller"),
    ("gcs_server", "gcs"),
    ("raylet/raylet", "raylet"),
    ("ray::", "other workers"),
)


def name_of(process: psutil.Process) -> str:
    """Return the table's name for a process; all others of Ray share one row."""
    command = " ".join(process.cmdline())
    return next((name for part, name in NAMES if part in command), "other of Ray's")


def spent(root: psutil.Process) -> dict[tuple[int, str], float]:
    """Return the CPU seconds so far of every process that Ray started, and of the clients here."""
    seconds = {}
    for process in root.children(recursive=True):
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds[process.pid, name_of(process)] = times.user + times.system
    return seconds | {(root.pid, "clients"): time.process_time()}


@contextmanager
def watched(seconds: Seconds) -> Iterator[None]:
    """Add the CPU seconds that processes spend during the `with`, by name."""
    root = psutil.Process()
    before = spent(root)
    yield
    counted: Counter[str] = Counter(seconds)
    for (pid, name), until in spent(root).items():
        counted[name] += until - before.get((pid, name), 0.0)
    seconds.update(counted)


def measure() -> tuple[dict[str, Seconds], Seconds]:
    """Return milliseconds per request by way and process, and per second without requests."""
    address = start_serve()
    serve.run(plain_serve(FakeEngine, NUM_FAKES), name="plain", route_prefix="/plain")
    serve.run(fake_tier(), name="tiny", route_prefix=None)
    serve.run(build_gateway(GatewayArgs(tiers=("tiny",), card="cpu")), name="gateway")
    ways = {"ray_serve": f"{address}/plain", "ours": address}
    seconds: dict[str, Seconds] = {way: {} for way in ways}
    num_answers: Counter[str] = Counter()
    elapsed_s: Counter[str] = Counter()
    for each in ways.values():
        asyncio.run(rate(each, WARM_S))
    idle: Seconds = {}
    with watched(idle):
        time.sleep(BURST_S)
    for _ in range(NUM_BURSTS):
        for way, each in ways.items():
            began = time.perf_counter()
            with watched(seconds[way]):
                found = asyncio.run(rate(each, BURST_S))
            taken_s = time.perf_counter() - began
            elapsed_s[way] += taken_s
            num_answers[way] += round(found * taken_s)
    serve.shutdown()
    ray.shutdown()
    idle = {name: each / BURST_S for name, each in idle.items()}
    per_request = {
        way: {
            name: 1000 * max(0.0, each - idle.get(name, 0.0) * elapsed_s[way]) / num_answers[way]
            for name, each in taken.items()
        }
        for way, taken in seconds.items()
    }
    return per_request, {name: 1000 * each for name, each in idle.items()}


def served_ms(taken: Seconds) -> float:
    """Return the sum over all processes but the clients'."""
    return sum(each for name, each in taken.items() if name != "clients")


def main() -> None:
    per_request, idle = measure()
    ours, plain = per_request["ours"], per_request["ray_serve"]
    table = Table(title=f"Processor time, ms a request, {CONCURRENCY} clients")
    for column in ("process", "ours", "Ray Serve", "idle, ms a second"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name in sorted(ours | plain, key=lambda name: -ours.get(name, 0.0)):
        cells = (each.get(name, 0.0) for each in (ours, plain, idle))
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    sums = served_ms(ours), served_ms(plain), served_ms(idle)
    table.add_row("all but clients", *(f"{each:.2f}" for each in sums))
    Console(width=100).print(table)
    figures = {"ms": per_request, "idle_ms": idle, "plain_to_ours": sums[1] / sums[0]}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
