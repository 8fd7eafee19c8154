"""A cluster of several nodes behind a real HAProxy, with load, for programs that break it.

They are programs because a process can be connected to only one Ray.
"""

import asyncio
import csv
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

import httpx
import psutil
import ray
import yaml
from ray import serve
from ray._private.node import Node
from ray.cluster_utils import Cluster

from tests.balancers import Balancer
from tests.cluster.conftest import BOOT_S, LAPTOP, free_port

TIER = "tiny"
LAPTOP_GROUP: dict[str, Any] = yaml.safe_load(LAPTOP.read_text())["applications"][2]
REQUEST = {"model": TIER, "prompt": "a red circle", "size": "64x64", "seed": 1}
SYSTEM_CONFIG = {"worker_niceness": 0}
MEMORY = {"object_store_memory": 100_000_000}
# A request is sent every so many seconds, whether or not those before it are done.
REQUEST_EVERY_S = 0.7
READY_EVERY_S = 0.5


@dataclass(frozen=True)
class Place:
    """A node by its id, the port of its proxy, and the process of its raylet."""

    node_id: str
    port: int
    raylet: psutil.Process

    @classmethod
    def of(cls, node: Node, port: int) -> "Place":
        (started,) = node.all_processes["raylet"]
        return cls(node.node_id, port, psutil.Process(started.process.pid))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Load:
    """The load: requests to the balancer, and `/readyz` asked of all addresses in `asked`.

    Requests ask the `tiers` in turn. One whose answer says that it should be retried is sent again,
    with the same idempotency key, up to `num_retries` times, as OpenAI's client does it.
    """

    balancer: str
    asked: tuple[str, ...]
    tiers: tuple[str, ...] = (TIER,)
    num_retries: int = 0
    num_sent: int = 0
    num_retried: int = 0
    took_s: list[float] = field(default_factory=list)
    ended_at: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    unready: Counter[str] = field(default_factory=Counter)

    async def run(self, end: asyncio.Event) -> None:
        """Send requests until `end` is set, then wait for their answers."""
        client = httpx.AsyncClient(timeout=BOOT_S, trust_env=False)
        async with client as http, asyncio.TaskGroup() as tasks:
            for address in self.asked:
                tasks.create_task(self.ask_again(http, address, end))
            while not end.is_set():
                tasks.create_task(self.generate(http))
                await asyncio.sleep(REQUEST_EVERY_S)

    async def generate(self, http: httpx.AsyncClient) -> None:
        began_at = time.monotonic()
        try:
            answer = await self.ask(http)
            failure = "" if answer.status_code == 200 else answer.text[:200]
        except httpx.TransportError as error:
            failure = repr(error)
        self.ended_at.append(time.monotonic())
        self.took_s.append(self.ended_at[-1] - began_at)
        if failure:
            print(
                f"{time.strftime('%H:%M:%S')} failed after {self.took_s[-1]:.1f} s: {failure}",
                file=sys.stderr,
            )
            self.failures[failure] += 1

    async def ask(self, http: httpx.AsyncClient) -> httpx.Response:
        """Ask for an image until the answer does not say that it should be retried."""
        self.num_sent += 1
        body = REQUEST | {"model": self.tiers[self.num_sent % len(self.tiers)]}
        url = f"{self.balancer}/v1/images/generations"
        headers = {"idempotency-key": str(uuid.uuid4())}
        for _ in range(self.num_retries):
            answer = await http.post(url, json=body, headers=headers)
            if answer.headers.get("x-should-retry") != "true":
                return answer
            self.num_retried += 1
            await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
        return await http.post(url, json=body, headers=headers)

    async def ask_again(self, http: httpx.AsyncClient, address: str, end: asyncio.Event) -> None:
        """Ask `/readyz` again and again, and count answers other than 200.

        A proxy that is gone does not answer, which does not count: a balancer leaves it out too.
        """
        while not end.is_set():
            with suppress(httpx.TransportError):
                answer = await http.get(f"{address}/readyz")
                self.unready[address] += answer.status_code != 200
            await asyncio.sleep(READY_EVERY_S)


def start_cluster() -> tuple[Cluster, Place]:
    """Start Ray and Serve on a head node without CPUs, so that no replica runs there."""
    port = free_port()
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SYSTEM_CONFIG, **MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
    serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": port})
    return cluster, Place.of(cluster.head_node, port)


def add_node(cluster: Cluster, port: int | None = None) -> Place:
    """Add a node with room for all replicas, whose proxy listens at `port`, or at a free one."""
    port = port or free_port()
    told = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(port)}
    return Place.of(cluster.add_node(num_cpus=2, env_vars=told, **MEMORY), port)


def config_in(folder: Path, port: int) -> dict[str, Any]:
    """Return serve/laptop.yaml with two gateways and two replicas of one tier."""
    config: dict[str, Any] = yaml.safe_load(LAPTOP.read_text())
    gateway, tier, _ = config["applications"]
    database = f"sqlite:///{folder}/jobs.sqlite3"
    gateway["args"] |= {
        "tiers": [TIER],
        "num_replicas": 2,
        "public_url": "http://127.0.0.1",
        "jobs": {"database": database, "results": f"{folder}/results"},
    }
    tier["args"] |= {"num_replicas": 2, "num_cpus": 0.25}
    config["http_options"]["port"] = port
    config["applications"] = [gateway, tier]
    return config


def num_resent(balancer: Balancer) -> int:
    """Return how often HAProxy has sent a request again, to the same node or another one."""
    told = balancer.command("show stat").removeprefix("# ")
    rows = csv.DictReader(told.splitlines())
    (backend,) = (row for row in rows if row["svname"] == "BACKEND")
    return int(backend["wretr"]) + int(backend["wredis"])


def num_replicas_on(place: Place) -> int:
    """Return how many live replicas the node has, of gateways and of the tier together."""
    from ray._private.state import state

    actors = state.actor_table(None, actor_state_name="ALIVE").values()
    here = [each for each in actors if each["Address"]["NodeID"] == place.node_id]
    return sum(each["ActorClassName"].startswith("ServeReplica:") for each in here)


def drain(cluster: Cluster, place: Place, notice_s: int) -> None:
    command = [Path(sys.executable).parent / "ray", "drain-node", "--address", cluster.address]
    command += ["--node-id", place.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "drill", "--deadline-remaining-seconds", str(notice_s)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def kill(place: Place) -> None:
    """Kill all processes of the node at once, as if its machine were taken away."""
    for process in (*place.raylet.children(recursive=True), place.raylet):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def figures_of(load: Load, left_s: float) -> dict[str, Any]:
    ends = sorted(load.ended_at)
    return {
        "num_sent": len(ends),
        "num_failed": load.failures.total(),
        "num_unready": load.unready.total(),
        "longest_gap_s": max(later - earlier for earlier, later in pairwise(ends)),
        "slowest_s": max(load.took_s),
        "left_s": left_s,
    }
