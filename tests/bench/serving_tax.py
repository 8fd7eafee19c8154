"""Measure what serving costs: HTTP, Serve and our router around an engine, and plainer servers."""

import asyncio
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"
# `make serve` sets this too.
os.environ["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] = "0"
os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "0"
os.environ["RAY_SERVE_PROXY_USE_GRPC"] = "1"
os.environ["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"] = str(2**31 - 1)
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "flux_ray.gateway.proxy:read_with_h11"
os.environ["MALLOC_ARENA_MAX"] = "1"

import httpx
import ray
import uvicorn
from ray import serve
from rich.console import Console
from rich.table import Table

from flux_ray.app import build_gateway, build_tier
from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import TierArgs
from tests.bench.serving_engines import (
    FAKE_S,
    NUM_FAKES,
    PATH,
    PROMPT,
    FakeEngine,
    TinyEngine,
    fake_tier,
    plain_serve,
    routes_around,
)

NUM_ROUNDS = 60
NUM_WARM = 8
CONCURRENCY = 32
BURST_S = 6.0
NUM_BURSTS = 3


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class PlainServer:
    """FastAPI in uvicorn, on a thread of this process; the engine has a thread of its own."""

    def __init__(self, engine: Callable[[], FakeEngine | TinyEngine]) -> None:
        self.address = f"http://127.0.0.1:{(port := free_port())}"
        self._server = uvicorn.Server(
            uvicorn.Config(routes_around(engine()), port=port, log_level="error")
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


def start_serve() -> str:
    """Start Ray and Serve on this machine, and return Serve's HTTP address."""
    port = free_port()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return f"http://127.0.0.1:{port}"


def ask(client: httpx.Client, address: str, seed: int) -> float:
    """Send one request and return its seconds."""
    began = time.perf_counter()
    client.post(address + PATH, json={"prompt": PROMPT, "seed": seed}).raise_for_status()
    return time.perf_counter() - began


def latencies(addresses: dict[str, str]) -> dict[str, list[float]]:
    """Return the seconds of requests sent one at a time; the ways take turns."""
    engine = TinyEngine()
    seconds: dict[str, list[float]] = {way: [] for way in ("engine", *addresses)}
    with httpx.Client(timeout=60) as client:
        for number in range(NUM_WARM + NUM_ROUNDS):
            began = time.perf_counter()
            engine.generate_now(PROMPT, number)
            taken = {"engine": time.perf_counter() - began}
            taken |= {way: ask(client, address, number) for way, address in addresses.items()}
            if number >= NUM_WARM:
                for way, taken_s in taken.items():
                    seconds[way].append(taken_s)
    return seconds


async def rate(address: str, seconds: float) -> float:
    """Return the requests per second of CONCURRENCY clients."""
    num_answers = 0
    end = time.perf_counter() + seconds
    async with httpx.AsyncClient(timeout=60) as client:

        async def keep_asking(seed: int) -> None:
            nonlocal num_answers
            while time.perf_counter() < end:
                answer = await client.post(address + PATH, json={"prompt": PROMPT, "seed": seed})
                answer.raise_for_status()
                num_answers += 1

        began = time.perf_counter()
        await asyncio.gather(*(keep_asking(seed) for seed in range(CONCURRENCY)))
        return num_answers / (time.perf_counter() - began)


def rates(addresses: dict[str, str]) -> dict[str, float]:
    """Return each way's median requests per second; the ways take turns in bursts."""
    seen: dict[str, list[float]] = {way: [] for way in addresses}
    for address in addresses.values():
        # This does not count: prices are learned in it, and replicas found.
        asyncio.run(rate(address, 1.0))
    for _ in range(NUM_BURSTS):
        for way, address in addresses.items():
            seen[way].append(asyncio.run(rate(address, BURST_S)))
    return {way: statistics.median(each) for way, each in seen.items()}


def measure_latencies() -> dict[str, list[float]]:
    """Measure latencies with the embedded model."""
    address = start_serve()
    serve.run(plain_serve(TinyEngine, 1), name="plain", route_prefix="/plain")
    # No cache: the other servers encode every prompt anew, too.
    args = TierArgs(tier="tiny", device="cpu", dtype="float32", num_cpus=0.5, cache_bytes=0)
    serve.run(build_tier(args), name="tiny", route_prefix=None)
    serve.run(build_gateway(GatewayArgs(tiers=("tiny",), card="cpu")), name="gateway")
    plain = PlainServer(TinyEngine)
    seconds = latencies(
        {"fastapi": plain.address, "ray_serve": f"{address}/plain", "ours": address}
    )
    plain.stop()
    serve.shutdown()
    ray.shutdown()
    return seconds


def measure_rates() -> dict[str, float]:
    """Measure rates with the engine that takes time but no CPU."""
    address = start_serve()
    serve.run(plain_serve(FakeEngine, NUM_FAKES), name="plain", route_prefix="/plain")
    serve.run(fake_tier(), name="tiny", route_prefix=None)
    serve.run(build_gateway(GatewayArgs(tiers=("tiny",), card="cpu")), name="gateway")
    plain = PlainServer(lambda: FakeEngine(NUM_FAKES))
    found = rates({"fastapi": plain.address, "ray_serve": f"{address}/plain", "ours": address})
    plain.stop()
    serve.shutdown()
    ray.shutdown()
    return found


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    seconds, found = measure_latencies(), measure_rates()
    bare = {share: percentile(seconds["engine"], share) for share in (0.5, 0.95)}
    added_ms = {
        way: {
            name: 1000 * (percentile(each, share) - bare[share])
            for name, share in (("p50", 0.5), ("p95", 0.95))
        }
        for way, each in seconds.items()
    }
    table = Table(title=f"Around one engine: latency with tiny ({1000 * bare[0.5]:.0f} ms bare),")
    for column in ("server", "added ms, median", "p95", f"requests/s, {CONCURRENCY} clients"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for way in ("fastapi", "ray_serve", "ours"):
        added = added_ms[way]
        table.add_row(way, f"{added['p50']:.1f}", f"{added['p95']:.1f}", f"{found[way]:.1f}")
    most = NUM_FAKES / FAKE_S
    table.caption = f"throughput: {NUM_FAKES} engines of {1000 * FAKE_S:.0f} ms, {most:.0f} at most"
    Console(width=100).print(table)
    figures = {
        "added_ms": added_ms["ours"],
        "requests_per_s": found,
        "added_ms_by_way": added_ms,
        "engine_ms": {"p50": 1000 * bare[0.5], "p95": 1000 * bare[0.95]},
        "share_of_ray_serve": found["ours"] / found["ray_serve"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
