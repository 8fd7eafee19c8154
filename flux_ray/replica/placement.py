"""Where the ranks of a group sit in the cluster, and how they are started there."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.errors import KilledForMemory
from flux_ray.replica.rank import CONCURRENCY_GROUPS, RankActor
from flux_ray.replica.transport import RankConnection, connect

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
    endpoint: Any = ranks[0].meet.remote()
    await asyncio.gather(*(rank.load.remote(endpoint) for rank in ranks))
    return await asyncio.gather(*map(put_to_work, ranks))


async def put_to_work(rank: ActorHandle[Any]) -> LoadedRank:
    """From now on it answers its line and nothing else but pings."""
    line = await connect(await rank.listen.remote())
    return LoadedRank(rank, line, asyncio.ensure_future(rank.work.remote()))
