"""A request and its price, so that it is priced once on its way; and what the ledger hears.

Who asks for images: until when, with what weight, and what they allow.

How long a running request still takes: by its price, then by the pace of its own steps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from flux_ray.request import ImageRequest, OnEvent, Progress, RanksDone, RequestEvent
from flux_ray.router.ledger.messages import Retry, SubmitRequest
from flux_ray.router.pricing import Cost, CostModel
from flux_ray.router.quotas import UNLIMITED, QuotaLimits, Use


@dataclass(frozen=True)
class Caller:
    """Requests of one `key` share what there is with those of others, by `weight`.

    `deadline_s`: refused at once, or later when it has become impossible, if it cannot be done
    within so many seconds; None is the tier's own. `may_spill`: another tier of an alias will do.
    `allowance`: what the key may have, through all gateways. `is_job`: nobody waits for it.
    `retry`: by what the request is known when it comes again, if that can be known.
    `on_event`: told how the images come along; of a second replica from the beginning.
    """

    key: str = ""
    weight: float = 1.0
    deadline_s: float | None = None
    may_spill: bool = False
    allowance: QuotaLimits = UNLIMITED
    is_job: bool = False
    retry: Retry | None = None
    on_event: OnEvent | None = field(default=None, compare=False)


ANYONE = Caller()


class Quote(NamedTuple):
    """`cost` is of one replica, `gpu_seconds` of all its cards."""

    request: ImageRequest
    cost: Cost
    gpu_seconds: float

    @property
    def cost_s(self) -> float:
        """Seconds of one replica, in all."""
        return self.cost.total_s

    @property
    def tier(self) -> str:
        """Whose price it is."""
        return self.request.tier

    @property
    def use(self) -> Use:
        """What its key will have used by it."""
        return Use(self.gpu_seconds, self.request.megapixels)


def quote_for(request: ImageRequest, prices: CostModel) -> Quote:
    """By what is known now."""
    cost = prices.price(request)
    return Quote(request, cost, prices.on_all_cards(request.tier, cost.total_s))


def offer_for(
    quote: Quote,
    number: int,
    deadline_s: float,
    caller: Caller,
    affinity: tuple[tuple[str, float], ...] = (),
) -> SubmitRequest:
    """What the ledger hears of an attempt."""
    request = quote.request
    # Two tiers may have the same request.
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
        work=work_of(request),
        retry=caller.retry,
        seed=request.seed,
    )


def work_of(request: ImageRequest) -> str:
    """A name for what is to be done, by which a request is known when it comes again.

    The seed is not in it: whose caller said none gets another one each time.
    """
    size = f"{request.width}x{request.height}x{request.num_images}"
    return f"{request.prompt_name} {size} {request.num_steps} {len(request.references)}"


# What takes less is over before the ledger would make anything of it, and listening costs a little.
# Its replica has the next request all the same: a price ends with the ranks' work, and the ledger
# hands over by it, while files are still made of the images.
FOLLOWED_S = 2.0
# News that come together say nothing of how fast the steps were.
MIN_MEASURED_S = 0.05


class RemainingTime:
    """Of one attempt, from its first step on: the price of what is left, at the pace so far."""

    def __init__(self, quote: Quote) -> None:
        self._request = request = quote.request
        self._step_s = quote.cost.denoise_s / request.num_denoise_steps
        num_decoded = request.num_images * (1 + len(request.preview_steps))
        self._decode_s = quote.cost.decode_s / num_decoded
        self._first: tuple[float, float] | None = None

    def left_s(self, progress: Progress, now: float) -> float:
        """Seconds until it is done."""
        priced_s = self._priced_s(progress.num_done)
        if self._first is None:
            self._first = priced_s, now
        at_first_s, began_at = self._first
        if now - began_at < MIN_MEASURED_S or priced_s >= at_first_s:
            return priced_s
        return priced_s * (now - began_at) / (at_first_s - priced_s)

    def _priced_s(self, num_done: int) -> float:
        """Of the steps that are left, and the images and previews that are not decoded."""
        request = self._request
        num_before, step = divmod(num_done - 1, request.num_steps)
        num_shown = sum(each < step + 1 for each in request.preview_steps)
        num_decoded = num_before * (1 + len(request.preview_steps)) + num_shown
        num_to_decode = request.num_images * (1 + len(request.preview_steps)) - num_decoded
        num_left = request.num_denoise_steps - num_done
        return num_left * self._step_s + num_to_decode * self._decode_s


def followed(
    quote: Quote, on_event: OnEvent | None, tell: Callable[[float], None]
) -> OnEvent | None:
    """`on_event`, with `tell` told how long it still takes; None where nobody has to listen.

    Nothing is left of it once the ranks are done: that is for `tell` alone to hear.
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
