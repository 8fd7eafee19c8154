"""Change and break a fleet behind HAProxy in every way that operators meet, under load.

`python -m tests.cluster.fleet_drills [NAME ...]` runs all drills or those named, and prints one
JSON object: for each what was sent, failed and retried, and how long nothing was answered. The
fleet: a head without CPUs whose GCS keeps its state in Redis, two nodes, two gateways, two replicas
of `tiny` and one of `tiny-tp2`.
"""

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.balancers import Balancer, haproxy
from tests.cluster.casualties import TIERS, processes_of
from tests.cluster.conftest import BOOT_S, are_running, deploy, free_port, is_ready, wait_until
from tests.cluster.fleet import (
    LAPTOP_GROUP,
    Load,
    Place,
    add_node,
    config_in,
    drain,
    kill,
    num_replicas_on,
    num_resent,
    start_cluster,
)

AROUND_S = 8.0
NUM_RETRIES = 2
NUM_REPLICAS = 5
# For how long the GCS is away.
AWAY_S = 3.0


@dataclass
class Fleet:
    """The cluster, its two nodes, and the configuration that it serves."""

    cluster: Cluster
    head: Place
    nodes: list[Place]
    config: dict[str, Any]
    folder: Path

    def args_of(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        (application,) = (each for each in config["applications"] if each["name"] == name)
        args: dict[str, Any] = application["args"]
        return args

    def deploy_with(self, name: str, **args: object) -> None:
        """Deploy the applications with `args` of one of them changed, and keep them so."""
        self.args_of(name, self.config).update(args)
        deploy(self.config)

    def wait_until_whole(self) -> None:
        """Wait until all applications run with all their replicas, and for a little longer."""

        def is_whole() -> bool:
            return are_running(serve.status()) and num_replicas() == NUM_REPLICAS

        wait_until(is_whole, timeout_s=BOOT_S, what="all replicas")

    def lose(self, place: Place) -> None:
        """Kill a node, and add another one whose proxy has the same port."""
        kill(place)
        (node,) = (each for each in self.cluster.worker_nodes if each.node_id == place.node_id)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(place)
        self.nodes.append(add_node(self.cluster, place.port))


def num_replicas() -> int:
    """Return how many replicas run, gateways too, in the eyes of Serve."""
    deployments = (
        deployment
        for application in serve.status().applications.values()
        for deployment in application.deployments.values()
    )
    return sum(each.replica_states.get("RUNNING", 0) for each in deployments)


def do_nothing(fleet: Fleet) -> None:
    """Leave it alone: what the load looks like without any event."""


def roll_with_room(fleet: Fleet) -> None:
    """Change an argument of a tier with two replicas."""
    fleet.deploy_with("tiny", cache_bytes=8_000_000)
    wait_until(lambda: not are_running(serve.status()), what="an update")


def roll_without_room(fleet: Fleet) -> None:
    """Change an argument where no further replica would fit."""
    with all_cpus_taken():
        fleet.deploy_with("tiny", cache_bytes=9_000_000)
        wait_until(lambda: not are_running(serve.status()), what="an update")
        fleet.wait_until_whole()


@ray.remote(num_cpus=0)
class Occupant:
    """An actor that holds CPUs."""

    def hold(self) -> None:
        """Return once it runs."""


@contextmanager
def all_cpus_taken() -> Iterator[None]:
    """Let nobody have the CPUs that the nodes have left."""
    occupants = [
        Occupant.options(
            num_cpus=int(left.get("CPU", 0) * 100) / 100,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote()
        for node_id, left in available_resources_per_node().items()
        if left.get("CPU", 0) > 0.01
    ]
    ray.get([each.hold.remote() for each in occupants], timeout=BOOT_S)
    yield
    for each in occupants:
        ray.kill(each)


def deploy_badly(fleet: Fleet) -> None:
    """Deploy a tier with an argument that its replicas cannot start with, then take it back."""
    bad = copy.deepcopy(fleet.config)
    fleet.args_of("tiny", bad)["weights"] = "/no/such/folder"
    deploy(bad)

    def has_failed() -> bool:
        return serve.status().applications["tiny"].status == "DEPLOY_FAILED"

    wait_until(has_failed, timeout_s=BOOT_S, what="a failed deployment")
    deploy(fleet.config)


def remove_tier(fleet: Fleet) -> None:
    """Deploy without one tier, then with it again."""
    without = copy.deepcopy(fleet.config)
    without["applications"] = [app for app in without["applications"] if app["name"] != TIERS[1]]
    deploy(without)
    wait_until(lambda: TIERS[1] not in serve.status().applications, what="a tier that is gone")
    deploy(fleet.config)


def kill_one(kind: str) -> Callable[[Fleet], None]:
    """Return the drill that kills one process of a kind."""

    def killing(fleet: Fleet) -> None:
        before = set(processes_of(kind))
        processes_of(kind)[-1].send_signal(signal.SIGKILL)

        def is_replaced() -> bool:
            now = set(processes_of(kind))
            return len(now) >= len(before) and now != before

        # Serve calls it RUNNING for a while yet.
        wait_until(is_replaced, timeout_s=BOOT_S, what=f"another {kind}")

    return killing


def lose_node(fleet: Fleet) -> None:
    """Kill the raylet of a node and all its processes; another node joins."""
    fleet.lose(fleet.nodes[0])


def drain_node(notice_s: int) -> Callable[[Fleet], None]:
    """Return the drill that drains a node, takes it away in so many seconds, and adds another."""

    def draining(fleet: Fleet) -> None:
        place = fleet.nodes[0]
        began_at = time.monotonic()
        drain(fleet.cluster, place, notice_s)
        # After the last replica has left there is nothing more to see for long notices.
        wait_until(
            lambda: not num_replicas_on(place) or time.monotonic() - began_at > notice_s,
            timeout_s=notice_s + 60,
            what="an empty node",
        )
        time.sleep(max(0.0, min(20.0, notice_s - (time.monotonic() - began_at))))
        fleet.lose(place)

    return draining


def restart_gcs(fleet: Fleet) -> None:
    """Kill the GCS, and start it again from what Redis keeps."""
    fleet.cluster.head_node.kill_gcs_server()
    time.sleep(AWAY_S)
    fleet.cluster.head_node.start_gcs_server()


DRILLS: dict[str, Callable[[Fleet], None]] = {
    "nothing": do_nothing,
    "rolling update with room": roll_with_room,
    "rolling update without room": roll_without_room,
    "bad deploy": deploy_badly,
    "tier removed and back": remove_tier,
    **{f"{kind} killed": kill_one(kind) for kind in ("proxy", "gateway", "ledger", "controller")},
    **{f"{kind} killed": kill_one(kind) for kind in ("rank", "leader")},
    "node lost": lose_node,
    "GCS restarted, Redis": restart_gcs,
    "node drained, 70 s": drain_node(70),
    "node drained, 1500 s": drain_node(1500),
}


@contextmanager
def under(load: Load) -> Iterator[None]:
    """Run the load in a thread of its own.

    The drills have the main thread: only there can Ray start a node, and what a thread starts is
    killed with it.
    """
    loop, end = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=[load.run(end)])
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


def run_drill(fleet: Fleet, balancer: Balancer, name: str) -> dict[str, Any]:
    """Run one drill under load, and return its row of the table."""
    tiers = TIERS[:1] if name == "tier removed and back" else TIERS
    asked = (balancer.url, fleet.head.address, *(place.address for place in fleet.nodes))
    load = Load(balancer.url, asked, tiers, NUM_RETRIES)
    resent = num_resent(balancer)
    with under(load):
        time.sleep(AROUND_S)
        began_at = time.monotonic()
        DRILLS[name](fleet)
        fleet.wait_until_whole()
        whole_s = time.monotonic() - began_at
        time.sleep(AROUND_S)
    ends = sorted(load.ended_at)
    row = {
        "num_sent": load.num_sent,
        "num_failed": load.failures.total(),
        "num_retried": load.num_retried,
        "num_resent": num_resent(balancer) - resent,
        "num_unready": load.unready.total(),
        "longest_gap_s": round(max(later - earlier for earlier, later in pairwise(ends)), 1),
        "slowest_s": round(max(load.took_s), 1),
        "whole_s": round(whole_s, 1),
        "failures": dict(load.failures),
    }
    print(name, row, file=sys.stderr, flush=True)
    return row


@contextmanager
def redis() -> Iterator[str]:
    """Run a Redis on a free port; yield its address."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()


def start_fleet(folder: Path) -> Fleet:
    """Start the nodes and deploy everything."""
    cluster, head = start_cluster()
    nodes = [add_node(cluster), add_node(cluster)]
    config = config_in(folder, head.port)
    gateway, _ = config["applications"]
    gateway["args"]["tiers"] = list(TIERS)
    group_args = LAPTOP_GROUP["args"] | {"num_cpus": 0.25}
    config["applications"].append(LAPTOP_GROUP | {"args": group_args})
    deploy(config)
    fleet = Fleet(cluster, head, nodes, config, folder)
    fleet.wait_until_whole()
    return fleet


def main() -> None:
    names = sys.argv[1:] or list(DRILLS)
    folder = Path(tempfile.mkdtemp())
    with redis() as address:
        os.environ["RAY_REDIS_ADDRESS"] = address
        fleet = start_fleet(folder)
        ports = [place.port for place in (fleet.head, *fleet.nodes)]
        with haproxy(folder, free_port(), ports) as balancer:
            wait_until(lambda: is_ready(balancer.url), timeout_s=BOOT_S, what="HAProxy")
            rows = {name: run_drill(fleet, balancer, name) for name in names}
        print(json.dumps(rows))
        serve.shutdown()
        ray.shutdown()
        fleet.cluster.shutdown()


if __name__ == "__main__":
    main()
