"""The leader of a replica: the Serve actor that takes requests and owns ranks and step loop.

`RunningRequests` keeps running requests and recent results by name, so that a client that repeats
a request joins the first run instead of paying for a second one. `ReplicaMetrics` counts. The
leader has no tensors and never imports torch.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any, ClassVar

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle

from flux_ray import __version__
from flux_ray.catalog import Tier, tier_for
from flux_ray.config import TierArgs
from flux_ray.errors import NotKept
from flux_ray.meter import add, counter, gauge, histogram
from flux_ray.metrics import (
    BUILD_INFO,
    CACHE_LOOKUPS,
    IMAGES,
    LOAD_SECONDS,
    MEGAPIXELS,
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
    Mask,
    RequestEvent,
    RgbImage,
    last_of,
)
from flux_ray.weights.start import parts_of_ranks, prepare_weights, too_slow
from flux_ray.wire import Description, Wire, pack_answer, packed, request_from


class ReplicaMetrics:
    """The metrics of one replica, counted by its leader."""

    def __init__(self, tier: str) -> None:
        self._tier = {"tier": tier}
        self._images = counter(IMAGES)
        self._requests = counter(REQUESTS)
        self._request_seconds = histogram(REQUEST_SECONDS)
        self._stage_seconds = histogram(STAGE_SECONDS)
        self._spent = counter(STAGE_SECONDS_SPENT)
        self._megapixels, self._lookups = counter(MEGAPIXELS), counter(CACHE_LOOKUPS)
        self._load_seconds, self._build = gauge(LOAD_SECONDS), gauge(BUILD_INFO)

    def show(self, load_s: float, quantization: str, card: str) -> None:
        """Show in how many seconds this replica loaded, and what it runs; gauges go out of date."""
        self._load_seconds.set(load_s, self._tier)
        build = {"version": __version__, "quantization": quantization, "card": card}
        self._build.set(1, self._tier | build)

    def look_up(self, request: ImageRequest, *, is_cached: bool) -> None:
        """Count what a request was given: megapixels, and an encoding from the cache or not."""
        self._megapixels.inc(request.megapixels, self._tier)
        self._lookups.inc(1, {**self._tier, "outcome": "hit" if is_cached else "miss"})

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Count the seconds that one stage of a request took."""
        labels = {**self._tier, "stage": stage}
        self._stage_seconds.observe(seconds, labels)
        add(self._spent, seconds, labels)

    @contextmanager
    def count(self, request: ImageRequest) -> Iterator[None]:
        """Count a request and its seconds from arrival to end, with the outcome of the block."""
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
    """A request that is being generated, and the streams of all who wait for it."""

    def __init__(self, events: EventStream) -> None:
        self.listeners: list[asyncio.Queue[RequestEvent | None]] = []
        self._finished: list[Finished] = []
        self.generation = asyncio.ensure_future(last_of(events, self._tell))
        self.generation.add_done_callback(lambda _: self._tell(None))

    async def stream(self) -> EventStream:
        """Yield the finished images, then all further events and the result; raise its error.

        Start reading at once: previews and progress from before the first read are missed. When the
        last reader closes its stream, the generation is cancelled.
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
    """Runs by name, and their results for `keep_s` seconds, up to `max_bytes` of them together.

    Only requests that may come again have a name. Several callers may read one run; it is cancelled
    when the last of them leaves. A gateway that dies cancels nothing: its runs go on, and clients
    that repeat their requests through another gateway find the results. Used on the leader's event
    loop.
    """

    def __init__(
        self, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._clock = clock
        self._running: dict[str, RunningRequest] = {}
        # By name: until when a result is kept, and the result. The first ends first.
        self._kept: dict[str, tuple[float, ImageResult]] = {}
        self._num_bytes = 0

    async def stream(self, name: str, events: EventStream) -> EventStream:
        """Run a new request under that name and yield its events; it replaces any earlier run."""
        self._drop(name)
        run = self._running[name] = RunningRequest(events)
        run.generation.add_done_callback(partial(self._end, name, run))
        async with aclosing(run.stream()) as own_events:
            async for event in own_events:
                yield event

    async def recall(self, name: str) -> EventStream:
        """Join the last run of that name, or yield its result; raise NotKept if there is neither.

        A result that is kept comes without its earlier events.
        """
        self.forget()
        if name in self._kept:
            yield self._kept[name][1]
            return
        run = self._running.get(name)
        # A run that everybody has left is about to end as cancelled: it will have no result.
        if run is None or not run.listeners:
            raise NotKept("this replica does not have the images, or not any more")
        async with aclosing(run.stream()) as events:
            async for event in events:
                yield event

    def forget(self) -> None:
        """Drop results that were kept for `keep_s`, and the oldest beyond `max_bytes`."""
        while self._kept:
            name, (until, _) = next(iter(self._kept.items()))
            if until > self._clock() and self._num_bytes <= self._max_bytes:
                return
            self._drop(name)

    def _end(self, name: str, run: RunningRequest, generation: asyncio.Task[ImageResult]) -> None:
        """Keep the result of a run that succeeded; one that failed is generated anew next time."""
        # Retrieve the error too: if all readers have left, nobody else does, and asyncio complains.
        is_generated = not generation.cancelled() and generation.exception() is None
        # A newer run has taken the name: its result counts, not this one.
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
    """Return the bytes of a result's image files, which are nearly all of its memory."""
    return sum(len(image.data) for image in result.images)


def end_with(ranks: Sequence[ActorHandle[Any]], pids: Sequence[int]) -> None:
    """Kill the ranks, then end this process: a rank that hangs would go on to hold its GPU.

    `pids`: the processes of ranks on this node. Ray gives away their GPUs as soon as this process
    has ended, but ends ranks that hang some seconds later.
    """
    for rank in ranks:
        ray.kill(rank)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end_process()


def warm_up_request(tier: Tier) -> ImageRequest:
    """Return the shortest request that runs every stage at the tier's default size: one step.

    It has a black image where the tier cannot work without one, under a mask where it needs that.
    """
    side = tier.default_side
    needs_image = tier.requires_mask or tier.takes_control
    return ImageRequest(
        request_id="warm-up",
        tier=tier.name,
        prompt="warm-up",
        width=side,
        height=side,
        num_steps=1,
        guidance=tier.guidance,
        seed=0,
        references=(RgbImage(side, side, bytes(3 * side**2)),) if needs_image else (),
        mask=Mask(side, side, b"\xff" * side**2) if tier.requires_mask else None,
        negative_prompt="" if tier.true_cfg_scale > 1 else None,
        true_cfg_scale=tier.true_cfg_scale,
        follows_reference=tier.takes_control,
    )


def description_of(args: TierArgs, card: str | None) -> Description:
    """Describe this process for gateways, as the Serve replica that starts now.

    `layout` is a digest of the tier's arguments and the GPU: replicas that are equal in both have
    equal speed, so what gateways learn of one holds for the other.
    """
    replica = serve.get_replica_context().replica_id.unique_id
    layout = sha256(f"{args.model_dump_json()} {card}".encode()).hexdigest()[:16]
    fields = args.model_dump(mode="json")
    return Description(PROTOCOL, replica, layout, fields, card, time.time())


class Leader:
    """The Serve deployment of a tier: each of its replicas is one leader with its rank group.

    Serve calls the public methods on the replica's event loop. Tests replace `rank_class`.
    """

    rank_class: ClassVar[type[RankActor]] = RankActor

    async def __init__(  # type: ignore[misc]
        self, args: TierArgs, text_encoder: DeploymentHandle[Any] | None = None
    ) -> None:
        """Load the ranks and generate a warm-up image; Serve takes the replica for RUNNING then.

        The weights come first, and the ranks only when they are on this node: WeightsUnavailable is
        raised in seconds, and no rank waits for a download. Raise TimeoutError if all of it takes
        longer than `load_timeout_s`.
        """
        began = time.monotonic()
        watchdog = StepWatchdog(args.min_step_timeout_s, args.step_timeout_s)
        prompts: Prompts = EncodedByRanks()
        if text_encoder is not None:
            prompts = EncodedElsewhere(text_encoder, args.step_timeout_s)
        parts = parts_of_ranks(args)
        try:
            async with asyncio.timeout(args.load_timeout_s) as limit:
                await asyncio.to_thread(prepare_weights, args, parts)
                ranks = start_ranks(self.rank_class, args)
                loaded, _ = await asyncio.gather(load_ranks(ranks), prompts.wait_until_loaded())
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(too_slow(args, parts)) from None
        self._load_s = time.monotonic() - began
        self._meter = ReplicaMetrics(args.tier)
        self._runs = RunningRequests(args.retry_bytes, args.retry_s)
        pids = [] if args.parallel.num_nodes > 1 else [rank.pid for rank in loaded]
        self._group = RankGroup(loaded, watchdog, lambda: end_with(ranks, pids))
        self._loop = StepLoop(self._group, prompts, self._meter.observe_stage)
        self._loop.pump.add_done_callback(self._end_with_loop)
        self._description = description_of(args, await ranks[0].card.remote())
        self._weights: str = args.quantization or args.dtype
        await last_of(self._loop.stream(warm_up_request(tier_for(args.tier))))

    def _end_with_loop(self, pump: asyncio.Task[None]) -> None:
        """End the replica if its step loop failed by a bug: all requests would wait for ever."""
        if not pump.cancelled():
            self._group.break_up("the step loop ended", pump.exception())

    async def generate(self, call: Wire) -> Wire:
        """Return the result of the request in `call`, without events.

        Raise ProtocolMismatch if the request has fields that this code does not know.
        """
        return pack_answer(await last_of(self._stream_of(call)))

    async def follow(self, call: Wire) -> AsyncIterator[Wire]:
        """Yield the events of the request in `call`, then its result; errors as in `generate`."""
        async with aclosing(self._stream_of(call)) as events:
            async for event in events:
                yield pack_answer(event)

    def _stream_of(self, call: Wire) -> EventStream:
        """Return the events of a call: of an earlier run that it recalls, or of a new one."""
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
                        self._meter.look_up(request, is_cached=result.times.is_cached)
                    else:
                        yield event
        # After the block: the request is counted as a success before the client, who closes this
        # stream once it has the result, could turn it into one that left.
        yield replace(result, layout=self._description.layout)

    async def describe(self, call: Wire) -> Wire:
        """Return this replica's Description: its version, and what gateways price it by."""
        description: Wire = packed(self._description)
        return description

    async def check_health(self) -> None:
        """Return unless the ranks have failed; Serve replaces a replica whose check fails.

        A rank that hangs is the group's to end. A check that waited for it would look, to those who
        watch this process, as if this one hung.
        """
        self._meter.show(self._load_s, self._weights, self._description.card or "cpu")
        self._group.check()
