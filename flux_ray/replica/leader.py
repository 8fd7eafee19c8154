"""The leader of a replica: takes requests, owns the rank group and the step loop. No tensors."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any, ClassVar

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle
from ray.util.placement_group import get_current_placement_group

from flux_ray.catalog.tiers import Tier, tier_for
from flux_ray.config.tier import TierArgs
from flux_ray.replica.metrics import ReplicaMetrics
from flux_ray.replica.patience import StepWatchdog
from flux_ray.replica.placement import load_ranks, start_ranks
from flux_ray.replica.process import end_process
from flux_ray.replica.prompts import EncodedByRanks, EncodedElsewhere, Prompts
from flux_ray.replica.rank import RankActor
from flux_ray.replica.rank_group import RankGroup
from flux_ray.replica.runs import RunningRequests
from flux_ray.replica.step_loop import StepLoop
from flux_ray.request import PROTOCOL, Hear, ImageRequest, ImageResult, follow
from flux_ray.wire import Description, Wire, pack_answer, packed, request_from


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


def description_of(args: TierArgs, card: str | None) -> Description:
    """Of the replica of Serve that this process is, and that starts now."""
    replica = serve.get_replica_context().replica_id.unique_id
    layout = sha256(f"{args.model_dump_json()} {card}".encode()).hexdigest()[:16]
    fields = args.model_dump(mode="json")
    return Description(PROTOCOL, replica, layout, fields, card, time.time())


class Leader:
    """One Serve replica = one rank group."""

    rank_class: ClassVar[type[RankActor]] = RankActor

    async def __init__(  # type: ignore[misc]
        self, args: TierArgs, text_encoder: DeploymentHandle[Any] | None = None
    ) -> None:
        """Serve awaits this: the replica is RUNNING once it has drawn a picture."""
        placement_group = get_current_placement_group()
        assert placement_group is not None, "a leader runs in its replica's placement group"
        ranks = start_ranks(self.rank_class, args, placement_group)
        patience = StepWatchdog(args.min_step_timeout_s, args.step_timeout_s)
        prompts: Prompts = EncodedByRanks()
        if text_encoder is not None:
            prompts = EncodedElsewhere(text_encoder, args.step_timeout_s)
        async with asyncio.timeout(args.load_timeout_s):
            loaded, _ = await asyncio.gather(load_ranks(ranks), prompts.wait_until_loaded())
        self._meter = ReplicaMetrics(args.tier)
        self._runs = RunningRequests(args.retry_bytes, args.retry_s)
        self._group = RankGroup(loaded, patience, lambda: end_with(ranks))
        self._loop = StepLoop(self._group, prompts, self._meter.observe_stage)
        self._loop.pump.add_done_callback(self._end_with_loop)
        self._description = description_of(args, await ranks[0].card.remote())
        await self._loop.generate(warm_up_request(tier_for(args.tier)))

    def _end_with_loop(self, pump: asyncio.Task[None]) -> None:
        """A loop that ended by a mistake of ours would leave every request waiting for ever."""
        if not pump.cancelled():
            self._group.break_up("the step loop ended", pump.exception())

    async def generate(self, call: Wire) -> Wire:
        """The images of the request in a call; ProtocolMismatch for one that is not understood."""
        return pack_answer(await self._drawing_of(call)(None))

    async def follow(self, call: Wire) -> AsyncIterator[Wire]:
        """The request's images, after what is to be heard of them."""
        async with aclosing(follow(self._drawing_of(call))) as stream:
            async for news in stream:
                yield pack_answer(news)

    def _drawing_of(self, call: Wire) -> Callable[[Hear | None], Awaitable[ImageResult]]:
        """How a call's images come about: they are drawn, or were for a call before it."""
        if "recall" in call:
            return partial(self._runs.recall, call["recall"])
        draw = partial(self._draw, request_from(call))
        return partial(self._runs.draw, call["run"], draw) if "run" in call else draw

    async def _draw(self, request: ImageRequest, hear: Hear | None = None) -> ImageResult:
        with self._meter.count(request):
            result = await self._loop.generate(request, hear)
        return replace(result, layout=self._description.layout)

    async def describe(self, call: Wire) -> Wire:
        """What a gateway has to know of this replica: its version, and what prices go by."""
        description: Wire = packed(self._description)
        return description

    async def check_health(self) -> None:
        """Serve's question: do all ranks answer?"""
        await self._group.ping()
