"""The rank group: N rank actors that are started, called and ended as one."""

import asyncio
import contextvars
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flux_ray.config import TierArgs
from flux_ray.errors import FluxError, ReplicaFailed
from flux_ray.replica.rank import CONCURRENCY_GROUPS, RankActor

logger = logging.getLogger("ray.serve")


def bundles_for(args: TierArgs, num_ranks: int = 1) -> list[dict[str, float]]:
    """The placement group of a replica: one bundle a rank; the leader sits in the first one."""
    bundle = {"CPU": args.num_cpus}
    if args.device == "cuda":
        bundle["GPU"] = 1.0
    return [dict(bundle) for _ in range(num_ranks)]


def start_ranks(args: TierArgs, placement_group: PlacementGroup) -> list[ActorHandle[Any]]:
    """One rank actor in every bundle of the leader's placement group."""
    # No restarts: a rank that comes back alone knows nothing of the jobs in flight.
    remote: Any = ray.remote
    actor = remote(max_restarts=0, concurrency_groups=CONCURRENCY_GROUPS)(RankActor)
    return [
        actor.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0.0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=rank
            ),
        ).remote(rank, args)
        for rank, bundle in enumerate(placement_group.bundle_specs)
    ]


async def wait_until_loaded(ranks: Sequence[ActorHandle[Any]], timeout_s: float) -> None:
    """Return when every rank has its weights; a rank's own error comes through."""
    pings = [rank.ping.remote() for rank in ranks]
    await asyncio.wait_for(asyncio.gather(*pings), timeout_s)


class RankGroup:
    """Calls go to all ranks or to none; a rank that dies, hangs or errs ends the group.

    `end` ends this process: a leader without its ranks is of no use, and callers learn of a dead
    actor at once, where a living one would be sent their second try.
    """

    def __init__(
        self, ranks: Sequence[ActorHandle[Any]], step_timeout_s: float, end: Callable[[], None]
    ) -> None:
        self._ranks = ranks
        self._step_timeout_s = step_timeout_s
        self._end = end
        loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[str] = loop.create_future()
        self._watcher = loop.create_task(self._watch(), context=contextvars.Context())

    async def call(self, method: str, *args: object) -> object:
        """The same call on every rank: rank 0's answer, or the FluxError that all of them raise."""
        if self._broken.done():
            raise ReplicaFailed(self._broken.result())
        answers = asyncio.gather(
            *(getattr(rank, method).remote(*args) for rank in self._ranks), return_exceptions=True
        )
        await asyncio.wait(
            (answers, self._broken),
            timeout=self._step_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not answers.done():
            raise self.break_up(f"{method} took longer than {self._step_timeout_s} s")
        return self._agree(method, answers.result())

    def _agree(self, method: str, answers: list[object]) -> object:
        errors = [cause_of(answer) for answer in answers if isinstance(answer, BaseException)]
        if not errors:
            return answers[0]
        for error in errors:
            if not isinstance(error, FluxError) or len(errors) < len(answers):
                raise self.break_up(f"{method} failed on a rank: {error!r}") from error
        raise errors[0] from None

    async def ping(self) -> None:
        """Return if every rank answers."""
        await asyncio.gather(*(rank.ping.remote() for rank in self._ranks))

    async def _watch(self) -> None:
        lives = [asyncio.ensure_future(rank.live.remote()) for rank in self._ranks]
        await asyncio.wait(lives, return_when=asyncio.FIRST_COMPLETED)
        self.break_up("a rank died")

    def break_up(self, reason: str) -> ReplicaFailed:
        """End the group, once; the error is for whoever waits for it."""
        if not self._broken.done():
            self._broken.set_result(reason)
            logger.error("The rank group is broken, its replica ends: %s", reason)
            self._end()
        return ReplicaFailed(self._broken.result())


def cause_of(error: BaseException) -> BaseException:
    """What a rank raised, without the wrapping that carried it here."""
    return error.cause if isinstance(error, RayTaskError) else error
