"""The proxy through which other processes call the ledger's actor, and start and end it.

`RemoteLedger` is the proxy, and `start_ledger` finds or starts the actor.

`HungProcesses` runs beside the ledger in its process: it watches gateways, leaders, text encoders
and Serve's controller, and kills those that hang. Serve would stop replicas gracefully, which a
stopped process does not hear: it would keep its GPUs for all of its `drain_timeout_s`. Nobody else
would miss the controller, without which no dead replica is replaced.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flux_ray.catalog import TIERS
from flux_ray.liveness import ASK_S, LOOK_S, NextSign, Watch
from flux_ray.meter import counter
from flux_ray.metrics import HUNG
from flux_ray.request import PROTOCOL
from flux_ray.router import handover
from flux_ray.router.background import SharedCall
from flux_ray.router.ledger.actor import LISTEN_S, LedgerActor
from flux_ray.router.ledger.service import LEDGER_BACK_S, LedgerLost

logger = logging.getLogger("ray.serve")

# Longer than a leader takes to find out that it is one of its ranks that hangs. After a kill Serve
# orders a successor at once; Ray waits five seconds more before it sends SIGKILL.
HUNG_S = 9.0
# A replica that is loading may not answer for long: importing libraries holds up its event loop.
LOADING_HUNG_S = 60.0
# Serve's controller does much of its work without a pause, ten seconds of it in a large cluster. A
# restart costs no request, but replicas that are still loading begin anew.
CONTROLLER_HUNG_S = 30.0
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

    def kill(self) -> None:
        """Kill the process; Ray starts it again, and it reads its state from its checkpoint."""
        ray.kill(self.actor, no_restart=False)


class HungProcesses:
    """A watch over all gateways, leaders, text encoders and the controller: it kills who hangs."""

    def __init__(self) -> None:
        self._watch = Watch(HUNG_S)
        self._asked: dict[str, AskedReplica | AskedController] = {}
        self._killed = counter(HUNG)
        # A thread of its own: its calls block while Ray's head is away, and would take up all the
        # threads that others need.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hung")

    async def run(self) -> None:
        """Watch for ever. While Ray's head is away nobody is missed: no kill would arrive."""
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

    def _end(self, actor: str) -> None:
        logger.error("%s hangs, and is ended", actor)
        name = replica_name(actor)
        self._killed.inc(1, {"process": "controller" if name is None else name.deployment})
        self._thread.submit(self._asked[actor].kill)


def is_up(actor: str) -> bool:
    """Return whether Serve says that this replica of a tier runs.

    Its silence counts from then on, even without a first answer: it may hang since before this
    process asked.
    """
    name = our_replicas([actor])[actor]
    return name.unique_id in handover.REACHABLE.get(name.application, ())


async def watch_processes() -> None:
    """Kill processes that hang, for as long as this process lives."""
    await HungProcesses().run()


# Code of another protocol has a ledger of its own: while a cluster is upgraded both live, and the
# old one ends when nobody has called it for a while.
NAME = f"flux-ray-ledger-{PROTOCOL}"
NAMESPACE = "flux-ray"
ANSWER_S = 5.0
# For what is asked before a request is submitted, which can do without an answer.
FORECAST_S = 1.0
# A gateway without an answer for so long is cut off from the cluster: a ledger that died or hangs
# would have been replaced.
LOST_S = LEDGER_BACK_S
# A ledger that leaves this many calls in a row unanswered hangs.
MAX_UNANSWERED = 2
# If a time limit ends this much too late, it was this process that stood still and read no answers,
# and the ledger must not be killed for it.
LAG_S = 1.0


P = ParamSpec("P")
T = TypeVar("T")


def remote_call(
    method: Callable[Concatenate[LedgerActor, P], Coroutine[Any, Any, T]],
    waits_s: float = 0.0,
    at_most_s: float = math.inf,
) -> Callable[Concatenate["RemoteLedger", P], Coroutine[Any, Any, T]]:
    """Make the proxy's method of a method of the ledger, with its types.

    `waits_s`: how long the ledger itself may take before it answers. `at_most_s`: how long the
    caller waits, if that is less than the proxy's own limit.
    """
    name = method.__name__

    async def call(line: "RemoteLedger", /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer: T = await line.call(min(waits_s + line.answer_s, at_most_s), name, *args, **kwargs)
        return answer

    return call


class RemoteLedger:
    """Call the ledger's actor, from any process; a `LedgerService`.

    The first call anywhere starts the actor. `answer_s`: how long a call waits before LedgerLost.
    After several calls without an answer the actor is killed, and Ray starts it anew.
    """

    def __init__(
        self,
        start: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.answer_s = answer_s
        self._start = start or start_ledger
        self._clock = clock
        # When the first of the calls began that have failed since the last answer; None if none.
        self._failing_since_s: float | None = None
        self._actor: Any = None
        self._num_unanswered = 0
        # A thread of its own: its calls block while Ray's head is away, and would take up all the
        # threads that others need.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._starting = SharedCall(self._thread, self._start)

    def is_heard(self) -> bool:
        """Return whether the ledger answers, or may soon: one that died is back within seconds.

        A gateway calls it twice a second, so that it counts as heard again with its first answer.
        """
        since_s = self._failing_since_s
        return since_s is None or self._clock() - since_s < LOST_S

    say = remote_call(LedgerActor.say)
    listen = remote_call(LedgerActor.listen, waits_s=LISTEN_S)
    forecast = remote_call(LedgerActor.forecast, at_most_s=FORECAST_S)
    places = remote_call(LedgerActor.places, at_most_s=FORECAST_S)
    backlog = remote_call(LedgerActor.backlog)
    share_prices = remote_call(LedgerActor.share_prices)
    enter = remote_call(LedgerActor.enter)
    leave = remote_call(LedgerActor.leave)
    share_usage = remote_call(LedgerActor.share_usage)

    async def call(self, timeout_s: float, method: str, *args: object, **kwargs: object) -> Any:
        """Call a method of the actor. Raise LedgerLost if it does not answer in time."""
        began_s = self._clock()
        try:
            answer = await self._answer(timeout_s, method, args, kwargs)
        except LedgerLost:
            if self._failing_since_s is None:
                self._failing_since_s = began_s
            raise
        self._failing_since_s = None
        return answer

    async def _answer(
        self, timeout_s: float, method: str, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Any:
        began_s = self._clock()
        try:
            async with asyncio.timeout(timeout_s):
                actor = await self._connected()
                answer = await called(actor, method, args, kwargs)
        except TimeoutError as error:
            if self._clock() - began_s < timeout_s + LAG_S:
                self._note_silence()
            raise LedgerLost(f"{method}: no answer within {timeout_s:g} s") from error
        except (RayError, ValueError) as error:
            # It died or is ending: ask by name again, which finds or starts one that lives.
            self._actor, self._num_unanswered = None, 0
            raise LedgerLost(f"{method}: {error}") from error
        self._num_unanswered = 0
        return answer

    async def _connected(self) -> Any:
        """Return the ledger's handle; while Ray's head is away, all callers wait for one call."""
        if self._actor is None:
            self._actor = await self._starting.result()
        return self._actor

    def _note_silence(self) -> None:
        """Count an unanswered call, and kill a ledger that hangs: it would not end by itself."""
        self._num_unanswered += 1
        if self._actor is not None and self._num_unanswered >= MAX_UNANSWERED:
            logger.error("the ledger hangs, and is started anew")
            self._num_unanswered = 0
            self._thread.submit(partial(ray.kill, self._actor, no_restart=False))


def called(actor: Any, method: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Any:
    """Call a method of the ledger; LedgerLost if its code is too old or too new to have it.

    One that is found by its name may have been started by another build of the same PROTOCOL.
    """
    try:
        return getattr(actor, method).remote(*args, **kwargs)
    except (AttributeError, TypeError) as error:
        raise LedgerLost(f"{method}: the ledger is of another version: {error}") from error


def start_ledger() -> Any:
    """Return the ledger's handle; start the actor if there is none. Blocks.

    It requires no CPUs: where tiers have taken them all, it could not start, and nothing would go
    on. All the same it is put on a node that has some: a head that offers none is not for work.
    """
    remote: Any = ray.remote
    actor = remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(LedgerActor)
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    node = node_for_ledger(nodes, ray.get_runtime_context().get_node_id())
    return actor.options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        # Soft: it may start anew on another node when this one is gone.
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
    ).remote(companion=watch_processes)


def node_for_ledger(nodes: Iterable[Mapping[str, Any]], own: str) -> str:
    """Return the id of a node that has processors: the caller's own if it has, else the first."""
    able = [
        str(node["NodeID"])
        for node in nodes
        if node["Alive"] and node.get("Resources", {}).get("CPU", 0) > 0
    ]
    return own if own in able or not able else min(able)
