"""The leader of a replica: takes requests, owns the rank group and the step loop. No tensors."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

import ray
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle
from ray.util.placement_group import get_current_placement_group

from flux_ray.catalog import Tier, tier_for
from flux_ray.config import TierArgs
from flux_ray.following import follow
from flux_ray.replica.group import RankGroup
from flux_ray.replica.loop import StepLoop
from flux_ray.replica.meter import Meter
from flux_ray.replica.patience import Patience
from flux_ray.replica.placement import load_ranks, start_ranks
from flux_ray.replica.process import end_process
from flux_ray.replica.prompts import EncodedByRanks, EncodedElsewhere, Prompts
from flux_ray.replica.rank import RankActor
from flux_ray.request import Hear, ImageRequest, ImageResult, News


def end_with(ranks: Sequence[ActorHandle[Any]]) -> None:
    """End this process, and first its ranks: one that hangs would hold its GPU meanwhile."""
    for rank in ranks:
        ray.kill(rank)
    end_process()


def warm_up_request(tier: Tier) -> ImageRequest:
    """The smallest request that goes through every stage at the tier's own size."""
    return ImageRequest(
        request_id="warm-up",
        tier=tier.name,
        prompt="warm-up",
        width=tier.default_side,
        height=tier.default_side,
        num_steps=1,
        guidance=tier.guidance,
        seed=0,
    )


class Leader:
    """One Serve replica = one rank group."""

    rank_class: ClassVar[type[RankActor]] = RankActor

    async def __init__(  # type: ignore[misc]
        self, args: TierArgs, text_encoder: DeploymentHandle[Any] | None = None
    ) -> None:
        """Serve awaits this: the replica is RUNNING once it has drawn a picture."""
        self._args = args
        placement_group = get_current_placement_group()
        assert placement_group is not None, "a leader runs in its replica's placement group"
        ranks = start_ranks(self.rank_class, args, placement_group)
        patience = Patience(args.min_step_timeout_s, args.step_timeout_s)
        prompts: Prompts = EncodedByRanks()
        if text_encoder is not None:
            prompts = EncodedElsewhere(text_encoder, args.step_timeout_s)
        async with asyncio.timeout(args.load_timeout_s):
            loaded, _ = await asyncio.gather(load_ranks(ranks), prompts.wait_until_loaded())
        self._meter = Meter(args.tier)
        self._group = RankGroup(loaded, patience, lambda: end_with(ranks))
        self._loop = StepLoop(self._group, prompts, self._meter.observe_stage)
        self._loop.pump.add_done_callback(self._end_with_loop)
        await self._loop.generate(warm_up_request(tier_for(args.tier)))

    def _end_with_loop(self, pump: asyncio.Task[None]) -> None:
        """A loop that ended by a mistake of ours would leave every request waiting for ever."""
        if not pump.cancelled():
            self._group.break_up("the step loop ended", pump.exception())

    async def generate(self, request: ImageRequest) -> ImageResult:
        """The request's pictures."""
        return await self._draw(request)

    async def follow(self, request: ImageRequest) -> AsyncIterator[News | ImageResult]:
        """The request's pictures, after what is to be heard of them."""
        async with aclosing(follow(lambda hear: self._draw(request, hear))) as stream:
            async for news in stream:
                yield news

    async def _draw(self, request: ImageRequest, hear: Hear | None = None) -> ImageResult:
        with self._meter.count(request):
            return await self._loop.generate(request, hear)

    async def describe(self) -> TierArgs:
        """How this replica is laid out: what a gateway needs to price its work."""
        return self._args

    async def check_health(self) -> None:
        """Serve's question: do all ranks answer?"""
        await self._group.ping()
