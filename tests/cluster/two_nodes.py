"""Run replicas on two nodes, take one node away, and print what became of them.

Prints one JSON object: on how many nodes two replicas of one rank were, and the two ranks of one
replica; how far their images are from each other, and whether the second was the same after a node
was lost and another one joined. This is a
program because a process can be connected to only one Ray.
"""

import io
import json
import os
import time
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

import numpy as np
import ray
from PIL import Image
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.handle import DeploymentHandle

from flux_ray.app import build_tier
from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.request import ImageRequest
from flux_ray.wire import answer_from, pack_request

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80_000_000}
HEAD = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": {"worker_niceness": 0}}
RECOVERY_S = 300


def request_for(tier: str) -> ImageRequest:
    return ImageRequest("a", tier, "a red circle", 64, 64, num_steps=4, guidance=1.0, seed=5)


def start(tier: str, **fields: Any) -> DeploymentHandle:
    args = TierArgs(tier=tier, device="cpu", dtype="float32", **fields)
    return serve.run(build_tier(args), name=tier, route_prefix=None)


def nodes_of_ranks() -> set[str]:
    from ray._private.state import state

    actors = state.actor_table(None, actor_state_name="ALIVE").values()
    return {a["Address"]["NodeID"] for a in actors if a["ActorClassName"] == "RankActor"}


def largest_difference(one: bytes, other: bytes) -> int:
    """Return the largest difference between two image files, over all bytes of their pixels."""
    first, second = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, other))
    return int(abs(first - second).max())


def generate(handle: DeploymentHandle, tier: str) -> bytes:
    answer = handle.generate.remote(pack_request(request_for(tier))).result(timeout_s=60)
    return answer_from(answer).images[0].data


def generate_again(handle: DeploymentHandle, tier: str) -> bytes:
    """Repeat the request until all ranks of the replica are up again."""
    end = time.monotonic() + RECOVERY_S
    while True:
        try:
            return generate(handle, tier)
        except (ray.exceptions.RayError, TimeoutError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    lost = cluster.add_node(**NODE)
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
    serve.start(proxy_location="Disabled")
    # One node has room for both.
    alone = generate(start("tiny", num_cpus=0.4, num_replicas=2), "tiny")
    num_nodes_of_replicas = len(nodes_of_ranks())
    serve.delete("tiny")
    # Each node has room for only one rank.
    split = start("tiny-tp2", num_cpus=0.9, parallel=Parallel(tensor=2, num_nodes=2))
    num_nodes_of_ranks = len(nodes_of_ranks())
    generated = generate(split, "tiny-tp2")
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(**NODE)
    again = generate_again(split, "tiny-tp2") == generated
    difference = largest_difference(alone, generated)
    figures = {
        "num_nodes_of_replicas": num_nodes_of_replicas,
        "num_nodes_of_ranks": num_nodes_of_ranks,
        "difference": difference,
        "again": again,
    }
    print(json.dumps(figures))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
