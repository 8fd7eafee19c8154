"""A request and its price, so that it is priced once on its way; and what the ledger hears."""

from typing import NamedTuple

from flux_ray.request import ImageRequest
from flux_ray.router.caller import Caller
from flux_ray.router.ledger.messages import SubmitRequest
from flux_ray.router.pricing.cost import Cost
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.quotas.usage import Use


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
