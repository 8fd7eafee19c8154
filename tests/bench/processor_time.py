"""Processor time of a request by process, ours beside plain Ray Serve: steady where clocks are not.

Seconds of a clock depend on who else runs on the machine, processor seconds hardly do. What bounds
the requests a second where all cores are taken is the sum over the processes. What a process spends
without requests, on health checks and metrics, is left out: it would be more by the slower way.
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

# It sets the environment of `make serve`, before Ray is loaded.
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
# Requests that are not counted: connections are made, prices learned.
WARM_S = 2.0
Seconds = dict[str, float]
# What a process is called, by what its command line has in it: the first that fits.
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
    """What the table calls it; everything else of Ray's is one row."""
    command = " ".join(process.cmdline())
    return next((name for part, name in NAMES if part in command), "other of Ray's")


def spent(root: psutil.Process) -> dict[tuple[int, str], float]:
    """Processor seconds so far of every process that Ray started, and of the clients, which ask."""
    seconds = {}
    for process in root.children(recursive=True):
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds[process.pid, name_of(process)] = times.user + times.system
    return seconds | {(root.pid, "clients"): time.process_time()}


@contextmanager
def watched(seconds: Seconds) -> Iterator[None]:
    """Add the processor seconds of what is done meanwhile, by name."""
    root = psutil.Process()
    before = spent(root)
    yield
    counted: Counter[str] = Counter(seconds)
    for (pid, name), until in spent(root).items():
        counted[name] += until - before.get((pid, name), 0.0)
    seconds.update(counted)


def measure() -> tuple[dict[str, Seconds], Seconds]:
    """Milliseconds a request by way and process; and of each second without requests."""
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
    """All but the clients' own."""
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
