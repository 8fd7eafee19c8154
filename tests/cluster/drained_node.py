"""Drain a node behind a real HAProxy under load, and print as a JSON object what failed.

`python -m tests.cluster.drained_node SECONDS`: the node is killed that many seconds after Ray is
told to drain it. Both replicas of the tier and both gateways are on it, and another node has just
been added.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray import serve
from ray.cluster_utils import Cluster

from tests.balancers import haproxy
from tests.cluster.conftest import BOOT_S, deploy, free_port, is_ready, wait_until
from tests.cluster.fleet import (
    Load,
    Place,
    add_node,
    config_in,
    drain,
    figures_of,
    kill,
    num_replicas_on,
    start_cluster,
)

# Seconds of load before the notice, and after the node is gone.
AROUND_S = 10.0
# After a long notice, the node is killed this many seconds after its last replica has left: from
# then on there is nothing more to see.
EMPTY_S = 20.0


async def drill(cluster: Cluster, old: Place, notice_s: int) -> float:
    """Return the seconds after which no replica was left on the node."""
    await asyncio.sleep(AROUND_S)
    began_at = time.monotonic()
    await asyncio.to_thread(drain, cluster, old, notice_s)
    left_at: float | None = None
    while time.monotonic() - began_at < notice_s:
        await asyncio.sleep(0.5)
        if left_at is None and not await asyncio.to_thread(num_replicas_on, old):
            left_at = time.monotonic()
        if left_at is not None and time.monotonic() - left_at > EMPTY_S and notice_s > BOOT_S:
            break
    kill(old)
    await asyncio.sleep(AROUND_S)
    return (left_at or time.monotonic()) - began_at


async def under_load(load: Load, cluster: Cluster, old: Place, notice_s: int) -> float:
    end = asyncio.Event()
    running = asyncio.create_task(load.run(end))
    try:
        return await drill(cluster, old, notice_s)
    finally:
        end.set()
        await running


def main() -> None:
    notice_s = int(sys.argv[1])
    folder = Path(tempfile.mkdtemp())
    cluster, head = start_cluster()
    old = add_node(cluster)
    deploy(config_in(folder, head.port))
    wait_until(lambda: is_ready(old.address), timeout_s=BOOT_S, what="a tier that serves")
    wait_until(lambda: num_replicas_on(old) == 4, timeout_s=BOOT_S, what="all replicas")
    new = add_node(cluster)
    with haproxy(folder, free_port(), [head.port, old.port, new.port]) as balancer:
        wait_until(lambda: is_ready(balancer.url), timeout_s=BOOT_S, what="HAProxy")
        load = Load(balancer.url, (balancer.url, head.address, old.address, new.address))
        left_s = asyncio.run(under_load(load, cluster, old, notice_s))
        print(json.dumps(figures_of(load, left_s)))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
