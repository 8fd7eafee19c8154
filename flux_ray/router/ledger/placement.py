"""Choose the ledger's node, and leave one that is being drained before it is taken away.

Ray starts an actor anew when it has found its node dead: on a machine that is cut off, only after
many seconds, in which nothing would be decided.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayError

logger = logging.getLogger("ray.serve")

# How often the ledger asks whether its node is being drained.
ASK_EVERY_S = 1.0


def node_for_ledger(
    nodes: Iterable[Mapping[str, Any]], own: str, draining: Collection[str] = ()
) -> str:
    """Return the id of a node that has processors: the caller's own if it has, else the first.

    Nodes that are being drained count only if all are.
    """
    able = [
        str(node["NodeID"])
        for node in nodes
        if node["Alive"] and node.get("Resources", {}).get("CPU", 0) > 0
    ]
    able = [node for node in able if node not in draining] or able
    return own if own in able or not able else min(able)


def chosen_node() -> str:
    """Return the node for a ledger that is started from this process. Blocks."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return node_for_ledger(nodes, own_node(), ray_state.get_draining_nodes())


def own_node() -> str:
    """Return the id of this process's node."""
    return str(ray.get_runtime_context().get_node_id())


def has_to_leave() -> bool:
    """Return whether this process's node is being drained, and there is another one. Blocks."""
    return own_node() in ray_state.get_draining_nodes() and chosen_node() != own_node()


def end_ledger() -> None:
    """End the ledger for good, in its own process: whoever calls it next starts another."""
    ray.kill(ray.get_runtime_context().current_actor)


async def leave_drained_node(
    has_to: Callable[[], bool] = has_to_leave, end: Callable[[], None] = end_ledger
) -> None:
    """End the ledger once its node is being drained, if there is another one for it."""
    loop = asyncio.get_running_loop()
    # A thread of its own: the call blocks while Ray's head is away.
    thread = ThreadPoolExecutor(1, thread_name_prefix="placement")
    try:
        while True:
            try:
                if await loop.run_in_executor(thread, has_to):
                    logger.info("the ledger leaves its node, which is being drained")
                    end()
                    return
            except RayError as error:
                logger.info("the ledger cannot ask which nodes are being drained: %s", error)
            await asyncio.sleep(ASK_EVERY_S)
    finally:
        # Without waiting: this is the event loop.
        thread.shutdown(wait=False)
