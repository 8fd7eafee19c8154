"""End replicas that hang: the Ray hands of the watch on gateways, leaders and text encoders.

Serve itself stops a replica that fails three checks gracefully, which a stopped process does not
hear: it would keep its cards for all of its `drain_timeout_s`.
"""

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from flux_ray.catalog.tiers import TIERS
from flux_ray.liveness import ASK_S, LOOK_S, Watch
from flux_ray.meter import counter
from flux_ray.metrics import HUNG

# The module, not what is in it: its items are replaced.
from flux_ray.router import handover

logger = logging.getLogger("ray.serve")

# Longer than a leader takes to find out that it is one of its ranks that hangs. Its successor is
# ordered at once; Ray waits five seconds more before it sends SIGKILL.
HUNG_S = 9.0
PREFIX = "SERVE_REPLICA::"
SERVE_NAMESPACE = "serve"
TIER_NAMES = frozenset(tier.name for tier in TIERS)


class ReplicaName(NamedTuple):
    """What the name of a replica's actor says."""

    application: str
    deployment: str
    unique_id: str

    @property
    def is_ours(self) -> bool:
        """Serve may run other people's applications too."""
        return self.deployment == "gateway" or self.application in TIER_NAMES


def replica_name(actor: str) -> ReplicaName | None:
    """None for an actor that is no replica of an application."""
    parts = actor.removeprefix(PREFIX).split("#")
    return ReplicaName(*parts) if actor.startswith(PREFIX) and len(parts) == 3 else None


def our_replicas(actors: Iterable[str]) -> dict[str, ReplicaName]:
    """Those among the cluster's named actors that are replicas of ours, by actor."""
    names = {actor: replica_name(actor) for actor in actors}
    return {actor: name for actor, name in names.items() if name is not None and name.is_ours}


class AskedReplica:
    """A replica's actor, asked for signs of life as Serve asks it."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._has_begun = False

    async def give_sign(self) -> None:
        """Return when its event loop has answered. RayActorError when it is dead."""
        while True:
            try:
                # While it loads weights, it is not to be missed yet.
                self._has_begun = self._has_begun or await self.actor.was_initialized.remote()
                if self._has_begun:
                    await self.actor.check_health.remote()
                    return
            except ActorUnavailableError:
                # The way to it is broken for now: that is no sign of it.
                pass
            except RayTaskError:
                # It is not well, and says so: Serve's business.
                return
            await asyncio.sleep(ASK_S)


class HungReplicas:
    """Asks all gateways, leaders and text encoders of the cluster, and kills those that hang."""

    def __init__(self) -> None:
        self._watch = Watch(HUNG_S)
        self._asked: dict[str, AskedReplica] = {}
        self._killed = counter(HUNG)
        # Of its own, and one: it stands still while Ray's head is away.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hung")

    async def run(self) -> None:
        """Never ends. While Ray's head is away nobody is missed: no kill would get there."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                found = await loop.run_in_executor(self._thread, self._find)
            except RayError as error:
                logger.info("replicas are not watched for now: %s", error)
            else:
                self._follow(found)
                for actor in self._watch.hung():
                    self._end(actor)
            await asyncio.sleep(LOOK_S)

    def _find(self) -> dict[str, Any]:
        """By name, the handles of replicas that are not watched yet. Blocks."""
        listed: Any = ray.util.list_named_actors(all_namespaces=True)
        names = [each["name"] for each in listed if each["namespace"] == SERVE_NAMESPACE]
        found = {}
        for actor in our_replicas(names).keys() - self._watch.names:
            try:
                found[actor] = ray.get_actor(actor, namespace=SERVE_NAMESPACE)
            except ValueError:
                logger.debug("%s is gone already", actor)
        return found

    def _follow(self, found: dict[str, Any]) -> None:
        for actor, handle in found.items():
            asked = AskedReplica(handle)
            self._watch.follow(actor, asked.give_sign)
            self._asked[actor] = asked
        for actor in self._asked.keys() - self._watch.names:
            del self._asked[actor]
        for actor in filter(is_up, self._asked):
            self._watch.expect(actor)

    def _end(self, actor: str) -> None:
        logger.error("%s hangs, and is ended", actor)
        name = our_replicas([actor])[actor]
        self._killed.inc(1, {"process": name.deployment})
        self._thread.submit(ray.kill, self._asked[actor].actor)


def is_up(actor: str) -> bool:
    """Whether Serve says that this replica of a tier runs: it may have hung before we came."""
    name = our_replicas([actor])[actor]
    return name.unique_id in handover.REACHABLE.get(name.application, ())


async def watch_replicas() -> None:
    """End what hangs, for as long as this process lives."""
    await HungReplicas().run()
