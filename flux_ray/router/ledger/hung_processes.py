"""End gateways, leaders, text encoders and Serve's controller when they hang.

`HungProcesses` runs beside the ledger in its process. Serve would stop replicas gracefully, which a
stopped process does not hear: it would keep its GPUs for all of its `drain_timeout_s`. Nobody else
would miss the controller, without which no dead replica is replaced.

Who has been silent for a few seconds is looked at on its node, and ended if it stands still. One
that is busy has longer.
"""

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import ray
from ray._private.state import state as ray_state
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flux_ray.catalog import TIERS
from flux_ray.liveness import ASK_S, LOOK_S, NextSign, Watch, end_process, stands_still
from flux_ray.meter import counter
from flux_ray.metrics import HUNG
from flux_ray.router import handover

logger = logging.getLogger("ray.serve")

# Longer than a leader takes to find out that it is one of its ranks that hangs. After a kill Serve
# orders a successor at once; Ray waits some seconds more before it sends SIGKILL.
HUNG_S = 9.0
# A replica that is loading may not answer for long: importing libraries holds up its event loop.
LOADING_HUNG_S = 60.0
# Serve's controller does much of its work without a pause, ten seconds of it in a large cluster. A
# restart costs no request, but replicas that are still loading begin anew.
CONTROLLER_HUNG_S = 30.0
# Who leaves a question unanswered for so long is looked at: for `STILL_S`, and with the start of a
# process for it no longer than `LOOKING_S`.
SUSPECT_S = 2.0
STILL_S = 2.0
LOOKING_S = 10.0
# A gateway of this age has loaded, though it has never answered this ledger.
GATEWAY_LOADED_S = 20.0
CONTROLLER = "SERVE_CONTROLLER_ACTOR"
PREFIX = "SERVE_REPLICA::"
SERVE_NAMESPACE = "serve"
TIER_NAMES = frozenset(tier.name for tier in TIERS)


class ReplicaName(NamedTuple):
    """The parts of the name that Serve gives to a replica's actor."""

    application: str
    deployment: str
    unique_id: str

    @property
    def is_ours(self) -> bool:
        """Return whether it is flux-ray's: Serve may run other people's applications too."""
        return self.deployment == "gateway" or self.application in TIER_NAMES


def replica_name(actor: str) -> ReplicaName | None:
    """Take an actor's name apart; return None if it is not that of a Serve replica."""
    parts = actor.removeprefix(PREFIX).split("#")
    return ReplicaName(*parts) if actor.startswith(PREFIX) and len(parts) == 3 else None


def our_replicas(actors: Iterable[str]) -> dict[str, ReplicaName]:
    """Return which of these named actors are flux-ray's replicas, by the actor's name."""
    names = {actor: replica_name(actor) for actor in actors}
    return {actor: name for actor, name in names.items() if name is not None and name.is_ours}


class AskedReplica:
    """A replica's actor that is asked for signs of life, in the way that Serve asks it."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._has_begun = False

    async def give_sign(self) -> NextSign | None:
        """Return once its event loop has answered. Raise RayActorError if it is dead."""
        while True:
            try:
                # While it loads its weights, a check would fail, and Serve would log that.
                self._has_begun = self._has_begun or await self.actor.was_initialized.remote()
                if not self._has_begun:
                    return NextSign(LOADING_HUNG_S)
                await self.actor.check_health.remote()
                return None
            except ActorUnavailableError:
                # The connection is broken for now, which is no sign of life: ask again.
                pass
            except RayTaskError:
                # It answers that it is unhealthy, so it does not hang: Serve will replace it.
                return None
            await asyncio.sleep(ASK_S)

    def expected_within_s(self, name: str) -> float | None:
        """Return within how many seconds it has to answer, None as long as it need not.

        That counts without a first answer: it may hang since before this process asked.
        """
        return HUNG_S if is_up(name) else None

    def idle_from_age_s(self, name: str) -> float | None:
        """Return from which age on it hangs if it does not compute; None if it may be loading.

        A tier that loads waits for a disk or the network for as long as its weights take.
        """
        if self._has_begun or is_up(name):
            return 0.0
        return GATEWAY_LOADED_S if is_gateway(name) else None

    def kill(self) -> None:
        """Kill the process; Serve starts another replica. Blocks while Ray's head is away."""
        ray.kill(self.actor)


class AskedController:
    """Serve's controller, asked for signs of life as AskedReplica is."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def give_sign(self) -> NextSign:
        """Return once it has answered. Raise RayActorError when Serve has been shut down."""
        while True:
            try:
                await self.actor.check_alive.remote()
                return NextSign(CONTROLLER_HUNG_S)
            except ActorUnavailableError:
                await asyncio.sleep(ASK_S)

    def expected_within_s(self, name: str) -> float | None:
        """Return within how many seconds it has to answer: it is never absent for longer."""
        return LOADING_HUNG_S

    def idle_from_age_s(self, name: str) -> float:
        """Return 0: it waits for nothing."""
        return 0.0

    def kill(self) -> None:
        """Kill the process; Ray starts it again, and it reads its state from its checkpoint."""
        ray.kill(self.actor, no_restart=False)


# Made once: Ray's head keeps a copy of each remote function for as long as it lives.
LOOK: Any = ray.remote(num_cpus=0, max_retries=0)(stands_still)
END: Any = ray.remote(num_cpus=0, max_retries=0)(end_process)


@dataclass(frozen=True)
class RemoteProcess:
    """A process by its node and its id there."""

    node: str
    pid: int

    async def beside(self, remote: Any, *args: object, thread: ThreadPoolExecutor) -> Any:
        """Run LOOK or END on the process's node, with its id and `args`; return what it returns.

        `thread` submits it, which blocks while Ray's head is away.
        """
        there = remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(self.node, False))
        submit = partial(there.remote, self.pid, *args)
        return await (await asyncio.get_running_loop().run_in_executor(thread, submit))


class HungProcesses:
    """A watch over all gateways, leaders, text encoders and the controller: it kills who hangs."""

    def __init__(self) -> None:
        self._watch = Watch(HUNG_S)
        self._asked: dict[str, AskedReplica | AskedController] = {}
        self._killed = counter(HUNG)
        # A thread of its own: its calls block while Ray's head is away, and would take up all the
        # threads that others need.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hung")
        self._looks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Watch for ever. While Ray's head is away nobody is missed: no kill would arrive."""
        try:
            await self._run()
        finally:
            self._watch.stop()
            for look in self._looks.values():
                look.cancel()
            # It may be blocked, and this is the event loop.
            self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                found = await loop.run_in_executor(self._thread, self._find)
            except RayError as error:
                logger.info("processes are not watched for now: %s", error)
            else:
                self._follow(found)
                for actor in self._watch.hung():
                    self._end(actor)
                self._look_at_silent()
            await asyncio.sleep(LOOK_S)

    def _find(self) -> dict[str, Any]:
        """Return the handles of actors that are not watched yet, by name. Blocks."""
        listed: Any = ray.util.list_named_actors(all_namespaces=True)
        names = [each["name"] for each in listed if each["namespace"] == SERVE_NAMESPACE]
        found = {}
        ours = our_replicas(names).keys() | ({CONTROLLER} & set(names))
        for actor in ours - self._watch.names:
            try:
                found[actor] = ray.get_actor(actor, namespace=SERVE_NAMESPACE)
            except ValueError:
                logger.debug("%s is gone already", actor)
        return found

    def _follow(self, found: dict[str, Any]) -> None:
        for actor, handle in found.items():
            asked = (AskedController if actor == CONTROLLER else AskedReplica)(handle)
            self._watch.follow(actor, asked.give_sign)
            self._asked[actor] = asked
        for actor in self._asked.keys() - self._watch.names:
            del self._asked[actor]
        for actor, asked in self._asked.items():
            within_s = asked.expected_within_s(actor)
            if within_s is not None:
                self._watch.expect(actor, within_s)

    def _look_at_silent(self) -> None:
        """Start a look at each process that has been silent for a while, and is not looked at."""
        for actor in self._asked.keys() & self._watch.names - self._looks.keys():
            if self._is_suspect(actor):
                self._looks[actor] = asyncio.create_task(self._look_at(actor))
                self._looks[actor].add_done_callback(partial(self._end_look, actor))

    def _end_look(self, actor: str, look: "asyncio.Task[None]") -> None:
        del self._looks[actor]

    def _is_suspect(self, actor: str) -> bool:
        is_silent = self._watch.unanswered_s(actor) > SUSPECT_S
        return is_silent and self._asked[actor].idle_from_age_s(actor) is not None

    async def _look_at(self, actor: str) -> None:
        """End a process if it stands still. Nothing happens if it cannot be looked at in time."""
        asked = self._asked[actor]
        from_age_s = asked.idle_from_age_s(actor)
        try:
            async with asyncio.timeout(LOOKING_S):
                process = await find_process(asked.actor, self._thread)
                began = await process.beside(LOOK, STILL_S, from_age_s, thread=self._thread)
        except (RayError, TimeoutError) as error:
            logger.info("%s is silent, and cannot be looked at: %s", actor, error)
            return
        # It may have answered meanwhile, or have been ended.
        if began is not None and actor in self._watch.names and self._is_suspect(actor):
            await self._end_there(actor, process, began)

    async def _end_there(self, actor: str, process: RemoteProcess, began: int) -> None:
        """End a process on its node, at once: Ray would first wait for it to end by itself."""
        kill = self._asked[actor].kill
        self._watch.leave(actor)
        self._note_end(actor)
        try:
            async with asyncio.timeout(LOOKING_S):
                await process.beside(END, began, thread=self._thread)
        except (RayError, TimeoutError) as error:
            logger.info("%s cannot be ended on its node: %s", actor, error)
            self._thread.submit(kill)

    def _end(self, actor: str) -> None:
        self._note_end(actor)
        self._thread.submit(self._asked[actor].kill)

    def _note_end(self, actor: str) -> None:
        logger.error("%s hangs, and is ended", actor)
        name = replica_name(actor)
        self._killed.inc(1, {"process": "controller" if name is None else name.deployment})


def is_gateway(actor: str) -> bool:
    """Return whether this replica is a gateway, and not of a tier."""
    return our_replicas([actor])[actor].deployment == "gateway"


def is_up(actor: str) -> bool:
    """Return whether Serve says that this replica of a tier runs.

    Its silence counts from then on, even without a first answer: it may hang since before this
    process asked.
    """
    name = our_replicas([actor])[actor]
    return name.unique_id in handover.REACHABLE.get(name.application, ())


def locate(actor: Any) -> RemoteProcess | None:
    """Return where an actor's process is; None if it is starting or dead. Blocks."""
    known: Any = ray_state.actor_table(actor._actor_id.hex())
    if known.get("State") != "ALIVE":
        return None
    return RemoteProcess(known["Address"]["NodeID"], known["Pid"])


async def find_process(actor: Any, thread: ThreadPoolExecutor) -> RemoteProcess:
    """Return where an actor's process is; `thread` asks Ray's head. Raise RayError if nowhere."""
    process = await asyncio.get_running_loop().run_in_executor(thread, locate, actor)
    if process is None:
        raise RayError("it is starting or dead")
    return process


async def watch_processes() -> None:
    """Kill processes that hang, for as long as this process lives."""
    await HungProcesses().run()
