"""The rank group: the rank actors of one replica, which are called and ended as one.

`start_ranks` and `load_ranks` place the ranks in the cluster and load the model. `RankGroup` then
sends every call to all of them, and ends the replica as soon as one dies, hangs or disagrees:
the others would wait for it in a collective for ever.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError
from ray.util.placement_group import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from flux_ray.config import TierArgs
from flux_ray.errors import FluxError, KilledForMemory, OutOfMemory, ReplicaFailed
from flux_ray.liveness import LOOK_S, Watch
from flux_ray.replica.process import KernelKills
from flux_ray.replica.rank import CONCURRENCY_GROUPS, RankActor
from flux_ray.replica.transport import RankConnection, connect, encode_frame
from flux_ray.replica.watchdog import StepWatchdog
from flux_ray.request import ImageRequest
from flux_ray.stages import Encoded, StageAnswer

logger = logging.getLogger("ray.serve")

# When a process is killed its connection closes at once, but Ray tells the cause a moment later.
CAUSE_S = 0.5
# All ranks find a caller's mistake at the same stage, so they report it within this time. If some
# do not, they are out of step.
GRACE_S = 1.0
# When a rank dies, the calls of the others fail a moment before its death and the cause are known.
# Wait for those, so that callers are told the cause and not its effect.
DEATH_S = 0.6
# How long a leader lives on after it decided to end, so that its last answer gets out.
LAST_WORDS_S = 1.0
# Ranks answer pings at once, whatever they compute: one that does not for so long hangs.
HUNG_S = 8.0


def resources_for(args: TierArgs) -> dict[str, Any]:
    """Return Serve's options for what a replica takes of the cluster.

    On one node the leader takes it all, for its ranks: Serve spreads the replicas of a deployment
    over nodes, but not if they have placement groups. Ranks on several nodes need one: a bundle for
    each rank, packed on as few nodes as possible.
    """
    num_ranks, num_gpus = args.parallel.num_ranks, int(args.device == "cuda")
    if args.parallel.num_nodes == 1:
        taken = {"num_cpus": num_ranks * args.num_cpus, "num_gpus": num_ranks * num_gpus}
        return {"ray_actor_options": taken | {"label_selector": args.node_labels}}
    bundle = {"CPU": args.num_cpus} | ({"GPU": 1.0} if num_gpus else {})
    return {
        "ray_actor_options": {"num_cpus": 0},
        "placement_group_bundles": [dict(bundle) for _ in range(num_ranks)],
        "placement_group_strategy": "PACK",
        "placement_group_bundle_label_selector": [dict(args.node_labels)],
    }


def ranks_by_node(node_of_bundle: Mapping[int, str], num_nodes: int) -> list[int]:
    """Return the bundle of each rank, such that ranks with neighbouring numbers share a node.

    Neighbours exchange the most, and Ray packs bundles without regard to their order. Raise
    ValueError if Ray used more than `num_nodes` nodes: the group would be slow as long as it lives.
    """
    nodes = list(dict.fromkeys(node_of_bundle[bundle] for bundle in sorted(node_of_bundle)))
    if len(nodes) > num_nodes:
        raise ValueError(f"the ranks got {len(nodes)} nodes, parallel.num_nodes is {num_nodes}")
    return sorted(node_of_bundle, key=lambda bundle: (nodes.index(node_of_bundle[bundle]), bundle))


def start_ranks(rank_class: type[RankActor], args: TierArgs) -> list[ActorHandle[Any]]:
    """Start the rank actors of the leader that calls this; return them by rank."""
    # No restarts: a rank that came back alone would know nothing of the jobs in flight.
    remote: Any = ray.remote
    actor = remote(max_restarts=0, concurrency_groups=CONCURRENCY_GROUPS)(rank_class)
    if args.parallel.num_nodes == 1:
        return start_beside_leader(actor, args)
    placement_group = get_current_placement_group()
    assert placement_group is not None, "this leader runs in its replica's placement group"
    # Ray annotates its result as something that is no dict.
    table: Any = placement_group_table(placement_group)
    return [
        actor.options(
            num_cpus=args.num_cpus,
            num_gpus=int(args.device == "cuda"),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=bundle
            ),
        ).remote(rank, args)
        for rank, bundle in enumerate(
            ranks_by_node(table["bundles_to_node_id"], args.parallel.num_nodes)
        )
    ]


def start_beside_leader(actor: Any, args: TierArgs) -> list[ActorHandle[Any]]:
    """Start the ranks on the leader's node, each with one of the GPUs that the leader was given."""
    node_id = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    num_ranks = args.parallel.num_ranks
    # In the node's order, by which neighbours have the fastest links; Ray gives them in any order.
    gpu_ids = sorted(map(str, ray.get_gpu_ids()), key=lambda gpu_id: (len(gpu_id), gpu_id))
    given: list[str | None] = [*gpu_ids] or [None] * num_ranks
    return [
        actor.options(num_cpus=0, num_gpus=0, scheduling_strategy=here).remote(rank, args, gpu_id)
        for rank, gpu_id in zip(range(num_ranks), given, strict=True)
    ]


@dataclass(frozen=True)
class LoadedRank:
    """A rank as its group sees it: its actor, and the connection for calls.

    `work` is the result of the actor's `work`, which is pending for as long as the rank lives.
    """

    actor: ActorHandle[Any]
    line: RankConnection
    work: asyncio.Future[None]
    pid: int

    def call(self, frame: bytes) -> asyncio.Future[Any]:
        """Send a call, encoded by `encode_frame`, and return the future of its answer."""
        return self.line.call(frame)

    def ping(self) -> Awaitable[int]:
        """Ask the rank for its process id, through Ray."""
        pid: Awaitable[int] = self.actor.ping.remote()
        return pid

    async def live(self) -> BaseException | None:
        """Wait until the rank is dead and return the cause: KilledForMemory if Ray says so.

        A closed connection shows it first, except if the whole node is lost: this closes no
        connection, but Ray notices.
        """
        ends = (self.line.closed, self.work)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([self.work], timeout=CAUSE_S)
        errors = [end.exception() for end in (self.work, self.line.closed) if end.done()]
        error = next((each for each in errors if each is not None), None)
        if isinstance(error, OutOfMemoryError):
            return KilledForMemory("its node was out of memory")
        return error


async def load_ranks(ranks: Sequence[ActorHandle[Any]]) -> list[LoadedRank]:
    """Wait until every rank has loaded its part of the model; raise the error of one that fails."""
    # Kept as Ray's reference: only the ranks need its value, and to read it would import torch.
    endpoint: Any = ranks[0].create_store.remote()
    await asyncio.gather(*(rank.load.remote(endpoint) for rank in ranks))
    return await asyncio.gather(*map(put_to_work, ranks))


async def put_to_work(rank: ActorHandle[Any]) -> LoadedRank:
    """Connect to a loaded rank and start its `work`; Ray then reaches only its control thread."""
    pid = await rank.ping.remote()
    line = await connect(await rank.listen.remote())
    return LoadedRank(rank, line, asyncio.ensure_future(rank.work.remote()), pid)


class Rank(Protocol):
    """The methods of a rank that its group uses; `LoadedRank` has them, and fakes in tests."""

    def call(self, frame: bytes) -> asyncio.Future[list[StageAnswer]]:
        """Send a call, encoded by `encode_frame`; a rank runs calls in the order they were sent."""

    def ping(self) -> Awaitable[int]:
        """Return the process id of the rank."""

    async def live(self) -> BaseException | None:
        """Wait until the rank is dead, and return the cause as far as it is known."""


class RankGroup:
    """The ranks of a replica as one: every call goes to all of them, or to none.

    A rank that dies, hangs or fails by a bug ends the group. `end` then ends the leader's process:
    without ranks it is of no use, and while it lived, the router could send a request's second try
    here again. `watchdog` limits the time of each call. Used on the leader's event loop.
    """

    def __init__(
        self, ranks: Sequence[Rank], watchdog: StepWatchdog, end: Callable[[], None]
    ) -> None:
        self._ranks = ranks
        self._watchdog = watchdog
        self._end = end
        self._kernel_kills = KernelKills()
        loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        # Of the job that the ranks began last, for the log.
        self._request_id = "none"
        self._broken: asyncio.Future[ReplicaFailed] = loop.create_future()
        self._ended = asyncio.Event()
        self._watcher = loop.create_task(self._watch())
        self._pinger = loop.create_task(self._watch_pings())

    async def run(
        self, job: int, stages: tuple[str, ...], sizes: tuple[int, ...], *payload: object
    ) -> list[StageAnswer]:
        """Run stages of a job on all ranks; return rank 0's answers, or raise the ranks' FluxError.

        `sizes`, in pixels, says how long the stages may take: they are compared with others of
        about that size. Calls may be sent before earlier ones are answered; the time limit of each
        starts when it is its turn. Raise ReplicaFailed if the group ends, and end it if the ranks
        disagree, or one fails or takes too long.
        """
        if self._broken.done():
            # Answer only when this process ends: on an earlier answer, the router would try again
            # and could be sent to this replica.
            await self._ended.wait()
            raise ReplicaFailed(self._broken.result().message)
        if payload and isinstance(payload[0], ImageRequest):
            self._request_id = payload[0].request_id
        frame = encode_frame((job, stages, *payload))
        calls = [rank.call(frame) for rank in self._ranks]
        # asyncio's lock is fair: calls take turns in the order in which they were sent.
        async with self._turn:
            began = time.perf_counter()
            name, timeout_s = "+".join(stages), self._watchdog.seconds_for(*stages, sizes=sizes)
            await self._wait_for_all(name, calls, timeout_s)
            taken_s = time.perf_counter() - began
        errors = [error for error in map(asyncio.Future.exception, calls) if error is not None]
        if errors and len(errors) < len(calls):
            raise self.break_up(f"{name} failed on some ranks only", errors[0])
        if errors:
            raise errors[0] from None
        answers = stretched(calls[0].result(), taken_s)
        self._learn(stages, sizes, answers)
        return answers

    def longest_s(self, stage: str, sizes: tuple[int, ...]) -> float:
        """Return the seconds of the longest recent stage of that kind and size; inf if none."""
        return self._watchdog.longest_s(stage, sizes)

    def _learn(
        self, stages: tuple[str, ...], sizes: tuple[int, ...], answers: list[StageAnswer]
    ) -> None:
        for stage, answer in zip(stages, answers, strict=True):
            # An encoding that came from the cache says nothing of how long encoding takes.
            if not (isinstance(answer.value, Encoded) and answer.value.is_cached):
                self._watchdog.learn(answer.seconds, stage, sizes)

    async def _wait_for_all(
        self, name: str, calls: list[asyncio.Future[list[StageAnswer]]], timeout_s: float
    ) -> None:
        """Wait until every rank has answered or raised a FluxError.

        Otherwise end the group and raise: if `timeout_s` passes, if a rank dies or raises another
        error, or if some ranks raise and others have not answered GRACE_S later.
        """
        clock = asyncio.get_running_loop().time
        end_s = clock() + timeout_s
        first: BaseException | None = None
        pending = set(calls)
        while pending:
            awaited: list[asyncio.Future[Any]] = [*pending, self._broken]
            await asyncio.wait(
                awaited,
                timeout=end_s - clock(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if self._broken.done():
                raise self._failure()
            done = {call for call in pending if call.done()}
            if not done and first is None:
                raise self.break_up(f"{name} took longer than {timeout_s:.1f} s")
            if not done:
                raise self.break_up(f"{name} failed on some ranks only", first)
            pending -= done
            for error in filter(None, map(asyncio.Future.exception, done)):
                failure = await self._failure_by(name, error)
                if failure is not None:
                    raise failure
                if first is None:
                    first, end_s = error, min(end_s, clock() + GRACE_S)

    async def _failure_by(self, name: str, error: BaseException) -> FluxError | None:
        """End the group for an error of one rank, and return what to raise at once.

        The other ranks may wait for this one in a collective, for ever. Return None if the error
        does not end the group: a caller's mistake, which all ranks raise.
        """
        if isinstance(error, OutOfMemory) and len(self._ranks) > 1:
            # A second try would end another group in the same way. So the caller gets this error,
            # which is not retried, before the process ends.
            self.break_up(f"{name} ran out of memory", error, LAST_WORDS_S)
            return error
        if isinstance(error, FluxError):
            return None
        await asyncio.wait([self._broken], timeout=DEATH_S)
        return self.break_up(f"{name} failed on a rank", error)

    def check(self) -> None:
        """Raise ReplicaFailed if the group has ended; its ranks are watched all the time."""
        if self._broken.done():
            raise self._failure()

    async def _watch(self) -> None:
        lives = [asyncio.ensure_future(rank.live()) for rank in self._ranks]
        dead, _ = await asyncio.wait(lives, return_when=asyncio.FIRST_COMPLETED)
        error = dead.pop().result()
        if self._kernel_kills.is_one_recent():
            # Ray sees only that a connection closed. It may have been another process of the
            # machine; the request has its second try, whatever the cause.
            error = KilledForMemory("its machine or container was out of memory")
        # The waiting caller has to get the cause before this process ends: its second try may end
        # another group in the same way.
        after_s = LAST_WORDS_S if isinstance(error, KilledForMemory) else 0.0
        self.break_up("a rank died", error, after_s)

    async def _watch_pings(self) -> None:
        """End the group when a rank does not answer pings, whether it has a call or not.

        The ranks take these pings for signs of life of their leader.
        """
        pings = Watch(HUNG_S)
        for number, rank in enumerate(self._ranks):
            pings.follow(f"rank {number}", rank.ping)
        while not self._broken.done():
            for name in pings.hung():
                self.break_up(f"{name} hangs")
            self._kernel_kills.look()
            await asyncio.sleep(LOOK_S)

    def break_up(
        self, reason: str, error: BaseException | None = None, after_s: float = 0.0
    ) -> ReplicaFailed:
        """End the group `after_s` seconds from now, and return the error for a waiting caller.

        Only the first call has an effect; later ones return the first one's error.
        """
        if not self._broken.done():
            kind = KilledForMemory if isinstance(error, KilledForMemory) else ReplicaFailed
            failed = kind(reason if error is None else f"{reason}: {error}")
            failed.__cause__ = error
            self._broken.set_result(failed)
            last = self._request_id
            logger.error("The replica ends: %s; last request: %s", failed, last, exc_info=error)
            if after_s:
                asyncio.get_running_loop().call_later(after_s, self._finish)
            else:
                self._finish()
        return self._failure()

    def _failure(self) -> ReplicaFailed:
        """Return a copy of the error that ended the group, for one caller to raise."""
        broken = self._broken.result()
        failed = type(broken)(broken.message)
        failed.__cause__ = broken.__cause__
        return failed

    def _finish(self) -> None:
        self._ended.set()
        self._end()


def stretched(answers: list[StageAnswer], taken_s: float) -> list[StageAnswer]:
    """Return rank 0's answers with their seconds scaled to the `taken_s` of the whole call.

    The call took longer than rank 0's own work: each stage gets its share of the rest, so that
    a request is charged for all the replica seconds that it used.
    """
    factor = taken_s / sum(answer.seconds for answer in answers)
    return [StageAnswer(answer.value, answer.seconds * factor) for answer in answers]
