"""Which of the tiers that can do a request should: pure decisions on prices and forecasts."""

from collections.abc import Sequence
from typing import NamedTuple

from flux_ray.config.gateway import Alias
from flux_ray.errors import BadRequest
from flux_ray.router.queue.admission import Forecast
from flux_ray.router.quote import Quote


class TierCandidate(NamedTuple):
    """A request as one tier would do it; `deadline_s` is from now, as `forecast` is."""

    quote: Quote
    deadline_s: float
    forecast: Forecast

    @property
    def wait_s(self) -> float:
        """Until it begins, on a replica that has to be started if there is none."""
        return self.forecast.wait_s

    @property
    def done_s(self) -> float:
        """Until it is done."""
        return self.wait_s + self.quote.cost_s

    @property
    def is_in_time(self) -> bool:
        """Whether the ledger would take it, and it would be done by its deadline."""
        return not self.forecast.is_refused and self.done_s <= self.deadline_s


def in_order(candidates: Sequence[TierCandidate], alias: Alias) -> list[TierCandidate]:
    """Those that may be tried, the one to try first first; they come best first.

    BadRequest if none is within the alias's price.
    """
    affordable = within_price(candidates, alias.max_gpu_seconds)
    if alias.policy == "cascade":
        # It is a matter of streams; who does not ask for one gets what it ends with.
        return affordable[:1]
    if alias.policy == "spill":
        return sorted(affordable, key=lambda each: spill_s(each, alias.max_wait_s))
    # Where none is in time: who would be done first.
    return sorted(affordable, key=lambda each: 0.0 if each.is_in_time else each.done_s)


def within_price(
    candidates: Sequence[TierCandidate], max_gpu_seconds: float | None
) -> list[TierCandidate]:
    """Those that cost no more."""
    if max_gpu_seconds is None:
        return list(candidates)
    affordable = [each for each in candidates if each.quote.gpu_seconds <= max_gpu_seconds]
    if not affordable:
        least = min(each.quote.gpu_seconds for each in candidates)
        raise BadRequest(
            f"it takes {least:.3g} GPU seconds, and this model has {max_gpu_seconds:g}", "model"
        )
    return affordable


def spill_s(candidate: TierCandidate, max_wait_s: float) -> float:
    """What a tier's wait counts: nothing up to the bound."""
    is_loaded = candidate.forecast.is_refused or candidate.wait_s > max_wait_s
    return candidate.wait_s if is_loaded else 0.0
