"""The leader of a replica: takes requests, owns the rank group and the step loop. No tensors."""

import asyncio
import logging
import os
from typing import NoReturn

from ray.util.placement_group import get_current_placement_group

from flux_ray.catalog import Tier, tier_for
from flux_ray.config import TierArgs
from flux_ray.replica.group import RankGroup, start_ranks, wait_until_loaded
from flux_ray.replica.loop import StepLoop
from flux_ray.replica.meter import Meter
from flux_ray.request import ImageRequest, ImageResult


def end_process() -> NoReturn:
    """Serve sees a dead actor at its next check, and builds the whole replica anew."""
    logging.shutdown()
    os._exit(1)


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

    async def __init__(self, args: TierArgs) -> None:  # type: ignore[misc]
        """Serve awaits this: the replica is RUNNING once it has drawn a picture."""
        placement_group = get_current_placement_group()
        assert placement_group is not None, "a leader runs in its replica's placement group"
        ranks = start_ranks(args, placement_group)
        await wait_until_loaded(ranks, args.load_timeout_s)
        self._meter = Meter(args.tier)
        self._group = RankGroup(ranks, args.step_timeout_s, end_process)
        self._loop = StepLoop(self._group, self._meter.observe_stage)
        self._loop.pump.add_done_callback(self._end_with_loop)
        await self._loop.generate(warm_up_request(tier_for(args.tier)))

    def _end_with_loop(self, pump: asyncio.Task[None]) -> None:
        """A loop that ended by a mistake of ours would leave every request waiting for ever."""
        if not pump.cancelled():
            self._group.break_up(f"the step loop ended: {pump.exception()!r}")

    async def generate(self, request: ImageRequest) -> ImageResult:
        """The request's pictures."""
        with self._meter.count(request):
            return await self._loop.generate(request)

    async def check_health(self) -> None:
        """Serve's question: do all ranks answer?"""
        await self._group.ping()
