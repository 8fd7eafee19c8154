"""End a Pod as Kubernetes does, under load, and print as a JSON object what became of its requests.

The node with both gateways and both replicas runs the preStop of the chart (cluster/kuberay/), and
is killed when that returns. Requests go to the proxy of another node, as those of a Service do once
the Pod is ending. This is a program because a process can be connected to only one Ray.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from tests.cluster.conftest import BOOT_S, ROOT, deploy, is_ready, wait_until
from tests.cluster.drained_node import (
    Load,
    Place,
    add_node,
    config_in,
    figures_of,
    kill,
    num_replicas_on,
    start_cluster,
)

SCRIPT = ROOT / "cluster" / "kuberay" / "chart" / "files" / "drain_node.sh"
# As in the chart: the grace period of 900 seconds less 20.
NOTICE_S = 880
AROUND_S = 5.0
# How often the Pod's view of its processes is brought up to date.
SEE_S = 0.2


@contextmanager
def processes_of(place: Place, folder: Path) -> Iterator[Path]:
    """Keep a folder that shows what a Pod's /proc would: the processes of this node alone."""
    (raylet,) = place.node.all_processes["raylet"]
    root, is_over = psutil.Process(raylet.process.pid), threading.Event()
    folder.mkdir()

    def see() -> None:
        with suppress(psutil.NoSuchProcess):
            for process in (root, *root.children(recursive=True)):
                with suppress(FileExistsError):
                    (folder / str(process.pid)).symlink_to(f"/proc/{process.pid}")

    def keep_seeing() -> None:
        while not is_over.wait(SEE_S):
            see()

    see()
    thread = threading.Thread(target=keep_seeing)
    thread.start()
    try:
        yield folder
    finally:
        is_over.set()
        thread.join()


def pre_stop(address: str, place: Place, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script in the environment that the operator makes for the Pod."""
    programs = Path(sys.executable).parent
    with processes_of(place, folder / "proc") as proc:
        told = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RAY_ADDRESS": address,
            "PROC": str(proc),
        }
        command = ["bash", str(SCRIPT), str(NOTICE_S)]
        return subprocess.run(command, env=os.environ | told, capture_output=True, text=True)


async def end(cluster: Cluster, pod: Place, folder: Path) -> dict[str, object]:
    """Return how the script ended, and how many replicas it left to be killed."""
    await asyncio.sleep(AROUND_S)
    began_s = time.monotonic()
    done = await asyncio.to_thread(pre_stop, cluster.address, pod, folder)
    took_s = time.monotonic() - began_s
    num_left = await asyncio.to_thread(num_replicas_on, pod)
    with suppress(psutil.NoSuchProcess):
        kill(pod)
    await asyncio.sleep(AROUND_S)
    told = (done.stdout.splitlines() or done.stderr.splitlines()[-1:] or [""])[-1]
    return {"code": done.returncode, "told": told, "num_left": num_left, "took_s": took_s}


async def under_load(load: Load, cluster: Cluster, pod: Place, folder: Path) -> dict[str, object]:
    is_over = asyncio.Event()
    running = asyncio.create_task(load.run(is_over))
    try:
        return await end(cluster, pod, folder)
    finally:
        is_over.set()
        await running


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    cluster, head = start_cluster()
    pod = add_node(cluster)
    deploy(config_in(folder, head.port))
    wait_until(lambda: is_ready(pod.address), timeout_s=BOOT_S, what="a tier that serves")
    wait_until(lambda: num_replicas_on(pod) == 4, timeout_s=BOOT_S, what="all replicas")
    other = add_node(cluster)
    load = Load(head.address, (head.address,))
    ended = asyncio.run(under_load(load, cluster, pod, folder))
    num_moved = num_replicas_on(other)
    took_s = ended.pop("took_s")
    print(json.dumps(figures_of(load, float(str(took_s))) | ended | {"num_moved": num_moved}))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
