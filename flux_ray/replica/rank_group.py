"""The rank group: N rank actors that are called and ended as one.

Where the ranks of a group sit in the cluster, and how they are started there.
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
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flux_ray.config import Parallel, TierArgs
from flux_ray.errors import FluxError, KilledForMemory, OutOfMemory, ReplicaFailed
from flux_ray.liveness import LOOK_S, Watch
from flux_ray.replica.rank import CONCURRENCY_GROUPS, RankActor
from flux_ray.replica.transport import RankConnection, connect, encode_frame
from flux_ray.replica.watchdog import StepWatchdog
from flux_ray.request import Encoded, StageAnswer

# The line to a process that is killed closes at once. Why it was killed, Ray says a moment later.
CAUSE_S = 0.5


def bundles_for(args: TierArgs) -> list[dict[str, float]]:
    """The placement group of a replica: one bundle a rank; the leader sits in the first one."""
    bundle = {"CPU": args.num_cpus}
    if args.device == "cuda":
        bundle["GPU"] = 1.0
    return [dict(bundle) for _ in range(args.parallel.num_ranks)]


def strategy_for(parallel: Parallel) -> str:
    """Ray's name for how near to each other the bundles must be."""
    return "STRICT_PACK" if parallel.num_nodes == 1 else "PACK"


def ranks_by_node(node_of_bundle: Mapping[int, str], num_nodes: int) -> list[int]:
    """The bundle of each rank. Ranks that exchange most are neighbours, and so share a node.

    Ray packs bundles as it can, without regard to their order. ValueError where it needed more
    than `num_nodes` nodes: such a group would be slow for as long as it lives.
    """
    nodes = list(dict.fromkeys(node_of_bundle[bundle] for bundle in sorted(node_of_bundle)))
    if len(nodes) > num_nodes:
        raise ValueError(f"the ranks got {len(nodes)} nodes, parallel.num_nodes is {num_nodes}")
    return sorted(node_of_bundle, key=lambda bundle: (nodes.index(node_of_bundle[bundle]), bundle))


def start_ranks(
    rank_class: type[RankActor], args: TierArgs, placement_group: PlacementGroup
) -> list[ActorHandle[Any]]:
    """One rank actor in every bundle of the leader's placement group, in order of rank."""
    # No restarts: a rank that comes back alone knows nothing of the jobs in flight.
    remote: Any = ray.remote
    actor = remote(max_restarts=0, concurrency_groups=CONCURRENCY_GROUPS)(rank_class)
    # Ray's annotation says no dict of it.
    table: Any = placement_group_table(placement_group)
    bundles = bundles_for(args)
    return [
        actor.options(
            num_cpus=bundles[bundle]["CPU"],
            num_gpus=bundles[bundle].get("GPU", 0.0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=bundle
            ),
        ).remote(rank, args)
        for rank, bundle in enumerate(
            ranks_by_node(table["bundles_to_node_id"], args.parallel.num_nodes)
        )
    ]


@dataclass(frozen=True)
class LoadedRank:
    """One rank as its group sees it. `work` is the actor's call that ends with it."""

    actor: ActorHandle[Any]
    line: RankConnection
    work: asyncio.Future[None]

    def call(self, frame: bytes) -> asyncio.Future[Any]:
        """What the rank answers to what `framed` a call."""
        return self.line.call(frame)

    def ping(self) -> Awaitable[int]:
        """Its process id."""
        pid: Awaitable[int] = self.actor.ping.remote()
        return pid

    async def live(self) -> BaseException | None:
        """Return when it is dead, and of what: KilledForMemory if Ray says so.

        A node that is gone closes no line; Ray finds out.
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
    """Return when every rank has its part of the model; a rank's own error comes through."""
    # A reference: its value is the ranks' alone, and needs torch to be read.
    endpoint: Any = ranks[0].create_store.remote()
    await asyncio.gather(*(rank.load.remote(endpoint) for rank in ranks))
    return await asyncio.gather(*map(put_to_work, ranks))


async def put_to_work(rank: ActorHandle[Any]) -> LoadedRank:
    """From now on it answers its line and nothing else but pings."""
    line = await connect(await rank.listen.remote())
    return LoadedRank(rank, line, asyncio.ensure_future(rank.work.remote()))


logger = logging.getLogger("ray.serve")

# All ranks find a caller's mistake at the same place, so they tell of it together.
GRACE_S = 1.0
# Where a rank dies, calls of the others fail a moment before it is known that it is dead, and why.
DEATH_S = 0.6
# So long a leader lives on, for its last answer to be on its way.
LAST_WORDS_S = 1.0
# A rank answers a ping at once, whatever it computes, or hangs.
HUNG_S = 8.0


class Rank(Protocol):
    """What the group needs of each of its ranks."""

    def call(self, frame: bytes) -> asyncio.Future[list[StageAnswer]]:
        """Have it run what `framed` the arguments, after what it was called for before."""

    def ping(self) -> Awaitable[int]:
        """Its process id."""

    async def live(self) -> BaseException | None:
        """Return when it is dead, and of what, as far as is known."""


class RankGroup:
    """Calls go to all ranks or to none; a rank that dies, hangs or errs ends the group.

    `end` ends this process: a leader without its ranks is of no use, and callers learn of a dead
    actor at once, where a living one would be sent their second try.
    """

    def __init__(
        self, ranks: Sequence[Rank], patience: StepWatchdog, end: Callable[[], None]
    ) -> None:
        self._ranks = ranks
        self._patience = patience
        self._end = end
        loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._broken: asyncio.Future[ReplicaFailed] = loop.create_future()
        self._ended = asyncio.Event()
        self._watcher = loop.create_task(self._watch())
        self._pinger = loop.create_task(self._watch_pings())

    async def run(
        self, job: int, stages: tuple[str, ...], sizes: tuple[int, ...], *payload: object
    ) -> list[StageAnswer]:
        """These stages on every rank: rank 0's answers, or the FluxError that all of them raise.

        `sizes` tells stages that take longer from others, in pixels. A call may be sent ahead of
        the answer to the one before it: it has its time from then on.
        """
        if self._broken.done():
            # Who heard of it while this process lives would be sent here again.
            await self._ended.wait()
            raise ReplicaFailed(self._broken.result().message)
        frame = encode_frame((job, stages, *payload))
        calls = [rank.call(frame) for rank in self._ranks]
        # Fair, so that calls have their turns in the order in which the ranks got them.
        async with self._turn:
            began = time.perf_counter()
            name, timeout_s = "+".join(stages), self._patience.seconds_for(*stages, sizes=sizes)
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
        """What the longest of the last such stages took; infinite for one that was never seen."""
        return self._patience.longest_s(stage, sizes)

    def _learn(
        self, stages: tuple[str, ...], sizes: tuple[int, ...], answers: list[StageAnswer]
    ) -> None:
        for stage, answer in zip(stages, answers, strict=True):
            # What was known says nothing of how long it takes to make it.
            if not (isinstance(answer.value, Encoded) and answer.value.is_cached):
                self._patience.learn(answer.seconds, stage, sizes)

    async def _wait_for_all(
        self, name: str, calls: list[asyncio.Future[list[StageAnswer]]], timeout_s: float
    ) -> None:
        """Return when every rank has answered or raised a FluxError."""
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
        """What to raise at once after an error of one rank that ends the group; None if it doesn't.

        The other ranks may wait for this one in a collective, for ever.
        """
        if isinstance(error, OutOfMemory) and len(self._ranks) > 1:
            # Elsewhere it would end another group: its caller is told before this one ends.
            self.break_up(f"{name} ran out of memory", error, LAST_WORDS_S)
            return error
        if isinstance(error, FluxError):
            return None
        await asyncio.wait([self._broken], timeout=DEATH_S)
        return self.break_up(f"{name} failed on a rank", error)

    async def ping(self) -> None:
        """Return if every rank answers."""
        await asyncio.gather(*(rank.ping() for rank in self._ranks))

    async def _watch(self) -> None:
        lives = [asyncio.ensure_future(rank.live()) for rank in self._ranks]
        dead, _ = await asyncio.wait(lives, return_when=asyncio.FIRST_COMPLETED)
        error = dead.pop().result()
        # Whoever waits has to hear what it died of, as its second try may end another group.
        after_s = LAST_WORDS_S if isinstance(error, KilledForMemory) else 0.0
        self.break_up("a rank died", error, after_s)

    async def _watch_pings(self) -> None:
        """End the group when a rank hangs, also one that has no call, or a call of unknown length.

        To the ranks these pings are their leader's signs of life.
        """
        pings = Watch(HUNG_S)
        for number, rank in enumerate(self._ranks):
            pings.follow(f"rank {number}", rank.ping)
        while not self._broken.done():
            for name in pings.hung():
                self.break_up(f"{name} hangs")
            await asyncio.sleep(LOOK_S)

    def break_up(
        self, reason: str, error: BaseException | None = None, after_s: float = 0.0
    ) -> ReplicaFailed:
        """End the group, once, after a while; what is returned is for whoever waits for it."""
        if not self._broken.done():
            kind = KilledForMemory if isinstance(error, KilledForMemory) else ReplicaFailed
            failed = kind(reason if error is None else f"{reason}: {error}")
            failed.__cause__ = error
            self._broken.set_result(failed)
            logger.error("The replica ends: %s", failed, exc_info=error)
            if after_s:
                asyncio.get_running_loop().call_later(after_s, self._finish)
            else:
                self._finish()
        return self._failure()

    def _failure(self) -> ReplicaFailed:
        """Return why it is broken, for one caller."""
        broken = self._broken.result()
        failed = type(broken)(broken.message)
        failed.__cause__ = broken.__cause__
        return failed

    def _finish(self) -> None:
        self._ended.set()
        self._end()


def stretched(answers: list[StageAnswer], taken_s: float) -> list[StageAnswer]:
    """Their call took the ranks longer than rank 0 worked on it: each stage its share of that."""
    factor = taken_s / sum(answer.seconds for answer in answers)
    return [StageAnswer(answer.value, answer.seconds * factor) for answer in answers]
