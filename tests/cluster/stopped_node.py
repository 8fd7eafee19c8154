"""Stop a worker as systemd does, behind a real HAProxy under load; print what failed as JSON.

`python -m tests.cluster.stopped_node SECONDS`: `ray start --block` has the worker's environment and
so many seconds to drain. Both replicas of the tier and both gateways are on it, and another node
has just been added.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from tests.balancers import haproxy
from tests.cluster.conftest import BOOT_S, deploy, free_port, is_ready, wait_until
from tests.cluster.drained_node import AROUND_S
from tests.cluster.fleet import (
    MEMORY,
    Load,
    Place,
    add_node,
    config_in,
    figures_of,
    num_replicas_on,
    start_cluster,
)


def start_worker(cluster: Cluster, notice_s: int) -> tuple[subprocess.Popen[bytes], Place]:
    """Start a worker by the command of its systemd unit, on this machine beside the head."""
    port = free_port()
    told = {
        "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(port),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(notice_s),
    }
    before = {each["NodeID"] for each in ray.nodes()}
    command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={cluster.address}"]
    command += ["--num-cpus=2", f"--object-store-memory={MEMORY['object_store_memory']}"]
    # That of the head is taken: both are on one machine here.
    command += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", "--block"]
    process = subprocess.Popen(command, env=os.environ | told, stdout=sys.stderr)

    def new_nodes() -> set[str]:
        return {each["NodeID"] for each in ray.nodes() if each["Alive"]} - before

    wait_until(new_nodes, timeout_s=BOOT_S, what="the worker")
    (node_id,) = new_nodes()
    (raylet,) = (each for each in psutil.Process(process.pid).children() if each.name() == "raylet")
    return process, Place(node_id, port, raylet)


async def stop_under_load(load: Load, worker: subprocess.Popen[bytes]) -> float:
    """Return the seconds that the worker took to end."""
    end = asyncio.Event()
    running = asyncio.create_task(load.run(end))
    try:
        await asyncio.sleep(AROUND_S)
        began_at = time.monotonic()
        worker.terminate()
        await asyncio.to_thread(worker.wait, BOOT_S)
        took_s = time.monotonic() - began_at
        await asyncio.sleep(AROUND_S)
        return took_s
    finally:
        end.set()
        await running


def figures(folder: Path, notice_s: int) -> dict[str, Any]:
    cluster, head = start_cluster()
    worker, old = start_worker(cluster, notice_s)
    try:
        deploy(config_in(folder, head.port))
        wait_until(lambda: is_ready(old.address), timeout_s=BOOT_S, what="a tier that serves")
        wait_until(lambda: num_replicas_on(old) == 4, timeout_s=BOOT_S, what="all replicas")
        new = add_node(cluster)
        with haproxy(folder, free_port(), [head.port, old.port, new.port]) as balancer:
            wait_until(lambda: is_ready(balancer.url), timeout_s=BOOT_S, what="HAProxy")
            load = Load(balancer.url, (balancer.url,))
            took_s = asyncio.run(stop_under_load(load, worker))
            return figures_of(load, took_s)
    finally:
        worker.kill()
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    print(json.dumps(figures(Path(tempfile.mkdtemp()), int(sys.argv[1]))))
