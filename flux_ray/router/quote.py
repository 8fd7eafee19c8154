"""A request with its price, who asks for it, and how long it still takes once it runs.

`Quote` carries the price, so that a request is priced once on its way; `submission_for` makes
of it what the ledger is told. `Caller` says until when it is wanted, with what weight and limits.
`RemainingTime` goes by the price first, then by the pace of the request's own steps.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import sha256
from typing import NamedTuple

from opentelemetry.trace import Span

from flux_ray.request import (
    ImageRequest,
    Mask,
    OnEvent,
    Progress,
    RanksDone,
    RequestEvent,
    RgbImage,
)
from flux_ray.router.ledger.messages import Retry, SubmitRequest
from flux_ray.router.pricing import Cost, CostModel
from flux_ray.router.quotas import UNLIMITED, QuotaLimits, Use
from flux_ray.tracing import GENERATE, Attribute, span

# What metrics call the class of callers without a key, or with a key of no class.
NO_CLASS = "none"


@dataclass(frozen=True)
class Caller:
    """Who asks for images, and on what terms.

    Requests of one `key` share the replicas with those of other keys, in proportion to `weight`.
    `deadline_s`: seconds within which it has to be done; it is refused as soon as that cannot be
    met. None stands for the tier's own. `may_spill`: another tier of an alias will do.
    `allowance`: the limits of the key over all gateways, `key_class` the name of its class.
    `spent_s`: seconds of its time that were over before the router saw it, and `spent_gpu_s` the
    GPU seconds that it cost until then: its prompt was upsampled.
    `is_job`: no client waits for it. `traceparent`: the span of the request that submitted it, in
    whose trace it is; empty if there is none.
    `retry`: the name under which the request is found when it is sent again, if it has one.
    `on_event`: called with the events of the request; if a second replica starts over, so do they.
    """

    key: str = ""
    weight: float = 1.0
    deadline_s: float | None = None
    may_spill: bool = False
    allowance: QuotaLimits = UNLIMITED
    key_class: str = NO_CLASS
    spent_s: float = 0.0
    spent_gpu_s: float = 0.0
    is_job: bool = False
    traceparent: str = ""
    retry: Retry | None = None
    on_event: OnEvent | None = field(default=None, compare=False)


ANYONE = Caller()


class Quote(NamedTuple):
    """A request with its price: `cost` in replica seconds, and `gpu_seconds` on all its GPUs.

    The latter has what was spent on it before, too.
    """

    request: ImageRequest
    cost: Cost
    gpu_seconds: float

    @property
    def cost_s(self) -> float:
        """Return the whole price in replica seconds."""
        return self.cost.total_s

    @property
    def tier(self) -> str:
        """Return the name of the tier whose price it is."""
        return self.request.tier

    @property
    def use(self) -> Use:
        """Return what the request will count as used by its key."""
        return Use(self.gpu_seconds, self.request.megapixels)


def quote_for(request: ImageRequest, prices: CostModel, spent_gpu_s: float = 0.0) -> Quote:
    """Price a request by what is known now of its tier; `spent_gpu_s` was spent on it before."""
    cost = prices.price(request)
    return Quote(request, cost, prices.on_all_cards(request.tier, cost.total_s) + spent_gpu_s)


def submission_for(
    quote: Quote,
    number: int,
    deadline_s: float,
    caller: Caller,
    affinity: tuple[tuple[str, float], ...] = (),
) -> SubmitRequest:
    """Make what is submitted to the ledger for the attempt of that number."""
    request = quote.request
    # The tier is in it because an alias may try the same request on two of them.
    ticket_id = f"{quote.tier}-{request.request_id}-{number}"
    return SubmitRequest(
        ticket_id,
        quote.tier,
        quote.cost_s,
        deadline_s,
        caller.key,
        caller.weight,
        affinity,
        has_deadline=caller.deadline_s is not None and not caller.is_job,
        is_job=caller.is_job,
        work=work_of(request, keeps_seed=caller.is_job),
        retry=caller.retry,
        seed=request.seed,
    )


def traced(quote: Quote, caller: Caller) -> AbstractContextManager[Span]:
    """Return a span of a request: it says what that costs and for whom, never what it asks for."""
    request = quote.request
    attributes: dict[str, Attribute] = {
        "flux.tier": request.tier,
        "flux.request_id": request.request_id,
        "flux.key": caller.key,
        "flux.key_class": caller.key_class,
        "flux.num_steps": request.num_steps,
        "flux.num_images": request.num_images,
        "flux.num_references": len(request.references),
        "flux.megapixels": request.megapixels,
        "flux.priced_gpu_s": quote.gpu_seconds,
    }
    return span(GENERATE, attributes, caller.traceparent)


def work_of(request: ImageRequest, *, keeps_seed: bool = False) -> str:
    """Return a name for the work, by which a request is recognized when it comes again.

    It is a digest of all fields but its id, so that no other request has it. `keeps_seed`: it comes
    again with its seed, as a job does; else that is left out, too: if the caller gave none, it is
    another one each time.
    """
    left_out = {"request_id"} if keeps_seed else {"request_id", "seed"}
    asked = [
        (each.name, comparable(getattr(request, each.name)))
        for each in fields(ImageRequest)
        if each.name not in left_out
    ]
    return sha256(repr(asked).encode()).hexdigest()


def comparable(value: object) -> object:
    """Return a field's value with digests for all pixels in it, which waiting jobs have too."""
    if isinstance(value, (RgbImage, Mask)):
        return value.digest
    if isinstance(value, tuple):
        return tuple(map(comparable, value))
    if is_dataclass(value):
        return [(each.name, comparable(getattr(value, each.name))) for each in fields(value)]
    return value


# A shorter request is over before the ledger could use its progress, and following costs a little.
# Its replica gets the next request in time all the same: the price ends with the ranks' work, and
# the ledger goes by it, while files are still made of the images.
FOLLOWED_S = 2.0
# Events that come together say nothing of how fast the steps were.
MIN_MEASURED_S = 0.05


class RemainingTime:
    """The remaining time of one attempt: the price of what is left, at the pace so far.

    Made when the attempt starts, and asked at each step.
    """

    def __init__(self, quote: Quote) -> None:
        self._request = request = quote.request
        self._step_s = quote.cost.denoise_s / request.num_denoise_steps
        num_decoded = request.num_images * (1 + len(request.preview_steps))
        self._decode_s = quote.cost.decode_s / num_decoded
        self._first: tuple[float, float] | None = None

    def left_s(self, progress: Progress, now: float) -> float:
        """Return the seconds until the ranks are done; `now` in seconds, monotonic."""
        priced_s = self._priced_s(progress.num_done)
        if self._first is None:
            self._first = priced_s, now
        at_first_s, began_at = self._first
        if now - began_at < MIN_MEASURED_S or priced_s >= at_first_s:
            return priced_s
        return priced_s * (now - began_at) / (at_first_s - priced_s)

    def _priced_s(self, num_done: int) -> float:
        """Return the price of the steps, images and previews that are still to be made."""
        request = self._request
        num_before, step = divmod(num_done - 1, request.num_steps_made)
        num_shown = sum(each < step + 1 for each in request.preview_steps)
        num_decoded = num_before * (1 + len(request.preview_steps)) + num_shown
        num_to_decode = request.num_images * (1 + len(request.preview_steps)) - num_decoded
        num_left = request.num_denoise_steps - num_done
        return num_left * self._step_s + num_to_decode * self._decode_s


def followed(
    quote: Quote, on_event: OnEvent | None, tell: Callable[[float], None]
) -> OnEvent | None:
    """Return `on_event` extended by calls of `tell` with the seconds left; None if nobody listens.

    RanksDone is not passed on: it tells only that nothing is left.
    """
    if on_event is None and quote.cost_s < FOLLOWED_S:
        return None
    pace = RemainingTime(quote)

    def follow(event: RequestEvent) -> None:
        if isinstance(event, RanksDone):
            tell(0.0)
            return
        if isinstance(event, Progress):
            tell(pace.left_s(event, time.monotonic()))
        if on_event is not None:
            on_event(event)

    return follow
