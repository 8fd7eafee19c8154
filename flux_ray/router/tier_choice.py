"""Choose which of the tiers that can do a request should do it, by price and forecast. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from flux_ray.config import Alias
from flux_ray.errors import BadRequest
from flux_ray.router.queue import Forecast
from flux_ray.router.quote import Quote


class TierCandidate(NamedTuple):
    """A tier that could do a request; `deadline_s` and `forecast` count from now."""

    quote: Quote
    deadline_s: float
    forecast: Forecast

    @property
    def wait_s(self) -> float:
        """Seconds until it starts, including the start of a replica if none is up."""
        return self.forecast.wait_s

    @property
    def done_s(self) -> float:
        """Seconds until it is done."""
        return self.wait_s + self.quote.cost_s

    @property
    def is_in_time(self) -> bool:
        """Whether the ledger would admit it, and it would be done by its deadline."""
        return not self.forecast.is_refused and self.done_s <= self.deadline_s


def in_order(candidates: Sequence[TierCandidate], alias: Alias) -> list[TierCandidate]:
    """Return the candidates that the alias allows, in the order in which to try them.

    `candidates` come best tier first. Raise BadRequest if none is within the alias's price.
    """
    affordable = within_price(candidates, alias.max_gpu_seconds)
    if alias.policy == "cascade":
        # Only a stream has previews of other tiers; any other request gets the image it ends with.
        return affordable[:1]
    if alias.policy == "spill":
        return sorted(affordable, key=lambda each: spill_s(each, alias.max_wait_s))
    # Those in time come first, best tier first; if none is in time, the one that is done first.
    return sorted(affordable, key=lambda each: 0.0 if each.is_in_time else each.done_s)


def within_price(
    candidates: Sequence[TierCandidate], max_gpu_seconds: float | None
) -> list[TierCandidate]:
    """Return the candidates within the price; raise BadRequest if there are none."""
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
    """Return a tier's wait as spilling counts it: 0 up to `max_wait_s`, then all of it."""
    is_loaded = candidate.forecast.is_refused or candidate.wait_s > max_wait_s
    return candidate.wait_s if is_loaded else 0.0
