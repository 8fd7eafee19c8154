"""The leader of a replica: takes requests, owns the rank group and the step loop. No tensors.

What a replica counts.

What a replica draws for requests that may come again, and for a while what it has drawn.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any, ClassVar

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle
from ray.util.placement_group import get_current_placement_group

from flux_ray.catalog import Tier, tier_for
from flux_ray.config import TierArgs
from flux_ray.errors import NotKept
from flux_ray.meter import counter, histogram
from flux_ray.metrics import (
    IMAGES,
    REQUEST_SECONDS,
    REQUESTS,
    STAGE_SECONDS,
    STAGE_SECONDS_SPENT,
)
from flux_ray.replica.process import end_process
from flux_ray.replica.rank import RankActor
from flux_ray.replica.rank_group import RankGroup, load_ranks, start_ranks
from flux_ray.replica.step_loop import StepLoop
from flux_ray.replica.text_encoder import EncodedByRanks, EncodedElsewhere, Prompts
from flux_ray.replica.watchdog import StepWatchdog
from flux_ray.request import (
    PROTOCOL,
    EventStream,
    Finished,
    ImageRequest,
    ImageResult,
    RequestEvent,
    last_of,
)
from flux_ray.wire import Description, Wire, pack_answer, packed, request_from


class ReplicaMetrics:
    """Counts what one replica of a tier does."""

    def __init__(self, tier: str) -> None:
        self._tier = {"tier": tier}
        self._images = counter(IMAGES)
        self._requests = counter(REQUESTS)
        self._request_seconds = histogram(REQUEST_SECONDS)
        self._stage_seconds = histogram(STAGE_SECONDS)
        self._spent = counter(STAGE_SECONDS_SPENT)

    def observe_stage(self, stage: str, seconds: float) -> None:
        """One stage of a request."""
        labels = {**self._tier, "stage": stage}
        self._stage_seconds.observe(seconds, labels)
        # Ray's counters raise for nothing at all, which a coarse clock may say.
        if seconds > 0:
            self._spent.inc(seconds, labels)

    @contextmanager
    def count(self, request: ImageRequest) -> Iterator[None]:
        """A request, from its arrival to its end."""
        began, outcome = time.perf_counter(), "failed"
        try:
            yield
            outcome = "drawn"
            self._images.inc(request.num_images, self._tier)
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "left"
            raise
        finally:
            self._requests.inc(1, {**self._tier, "outcome": outcome})
            self._request_seconds.observe(time.perf_counter() - began, self._tier)


class RunningRequest:
    """A request while it is drawn, and those who wait for it."""

    def __init__(self, events: EventStream) -> None:
        self.listeners: list[asyncio.Queue[RequestEvent | None]] = []
        self._finished: list[Finished] = []
        self.generation = asyncio.ensure_future(last_of(events, self._tell))
        self.generation.add_done_callback(lambda _: self._tell(None))

    async def stream(self) -> EventStream:
        """Yield what comes from now on, after the images that are done; the last to leave ends it.

        Read it at once: what is told before is not heard.
        """
        events: asyncio.Queue[RequestEvent | None] = asyncio.Queue()
        for image in self._finished:
            events.put_nowait(image)
        self.listeners.append(events)
        try:
            while (event := await events.get()) is not None:
                yield event
            yield self.generation.result()
        finally:
            self.listeners.remove(events)
            if not self.listeners:
                self.generation.cancel()

    def _tell(self, event: RequestEvent | None) -> None:
        if isinstance(event, Finished):
            self._finished.append(event)
        for events in self.listeners:
            events.put_nowait(event)


class RunningRequests:
    """Draws, and keeps results of up to `max_bytes`, each for `keep_s` seconds.

    Whoever waits for a run may leave by being cancelled, and the last one ends it. A gateway that
    dies cancels nothing: its runs go on, and their results are there for who asks again.
    """

    def __init__(
        self, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._clock = clock
        self._running: dict[str, RunningRequest] = {}
        # Until when, by name, in that order.
        self._kept: dict[str, tuple[float, ImageResult]] = {}
        self._num_bytes = 0

    async def stream(self, name: str, events: EventStream) -> EventStream:
        """Draw a request under that name: the last run of a name is the one that is found."""
        self._drop(name)
        run = self._running[name] = RunningRequest(events)
        run.generation.add_done_callback(partial(self._end, name, run))
        async with aclosing(run.stream()) as own_events:
            async for event in own_events:
                yield event

    async def recall(self, name: str) -> EventStream:
        """Join the last run of that name, or yield its result; NotKept if there is neither."""
        self.forget()
        if name in self._kept:
            yield self._kept[name][1]
            return
        run = self._running.get(name)
        # One that everybody left is about to end.
        if run is None or not run.listeners:
            raise NotKept("this replica does not have the images, or not any more")
        async with aclosing(run.stream()) as events:
            async for event in events:
                yield event

    def forget(self) -> None:
        """Drop what has been kept for long enough."""
        while self._kept:
            name, (until, _) = next(iter(self._kept.items()))
            if until > self._clock() and self._num_bytes <= self._max_bytes:
                return
            self._drop(name)

    def _end(self, name: str, run: RunningRequest, generation: asyncio.Task[ImageResult]) -> None:
        """Keep what was drawn; of what was not, the next one is to be drawn anew."""
        # Asking for the error too: nobody else may, and asyncio complains of errors unheard.
        is_generated = not generation.cancelled() and generation.exception() is None
        if self._running.get(name) is not run:
            return
        del self._running[name]
        if not is_generated:
            return
        result = generation.result()
        self._kept[name] = (self._clock() + self._keep_s, result)
        self._num_bytes += num_bytes(result)
        self.forget()
        asyncio.get_running_loop().call_later(self._keep_s, self.forget)

    def _drop(self, name: str) -> None:
        if name in self._kept:
            _, result = self._kept.pop(name)
            self._num_bytes -= num_bytes(result)


def num_bytes(result: ImageResult) -> int:
    """What it takes to keep it."""
    return sum(len(image.data) for image in result.images)


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
        """Serve awaits this: the replica is RUNNING once it has drawn an image."""
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
        await last_of(self._loop.stream(warm_up_request(tier_for(args.tier))))

    def _end_with_loop(self, pump: asyncio.Task[None]) -> None:
        """A loop that ended by a mistake of ours would leave every request waiting for ever."""
        if not pump.cancelled():
            self._group.break_up("the step loop ended", pump.exception())

    async def generate(self, call: Wire) -> Wire:
        """The images of the request in a call; ProtocolMismatch for one that is not understood."""
        return pack_answer(await last_of(self._stream_of(call)))

    async def follow(self, call: Wire) -> AsyncIterator[Wire]:
        """The request's images, after what is to be heard of them."""
        async with aclosing(self._stream_of(call)) as events:
            async for event in events:
                yield pack_answer(event)

    def _stream_of(self, call: Wire) -> EventStream:
        """How a call's images come about: they are drawn, or were for a call before it."""
        if "recall" in call:
            return self._runs.recall(call["recall"])
        events = self._stream(request_from(call))
        return self._runs.stream(call["run"], events) if "run" in call else events

    async def _stream(self, request: ImageRequest) -> EventStream:
        with self._meter.count(request):
            async with aclosing(self._loop.stream(request)) as events:
                async for event in events:
                    if isinstance(event, ImageResult):
                        result = event
                    else:
                        yield event
        # Counted as drawn before anybody can leave with it.
        yield replace(result, layout=self._description.layout)

    async def describe(self, call: Wire) -> Wire:
        """What a gateway has to know of this replica: its version, and what prices go by."""
        description: Wire = packed(self._description)
        return description

    async def check_health(self) -> None:
        """Serve's question: do all ranks answer?"""
        await self._group.ping()
