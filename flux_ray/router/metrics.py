"""The metrics that a gateway counts: prices, their errors, waits, refusals and limits."""

from collections.abc import Iterable

from flux_ray.meter import add, counter, histogram
from flux_ray.metrics import (
    COST_ERROR,
    GPU_SECONDS_SPENT,
    LIMITED,
    PRICED_SECONDS,
    QUEUE_SECONDS_SPENT,
    REFUSED,
)
from flux_ray.router.pricing import Observation


class RouterMetrics:
    """The metrics of one gateway, counted by its router."""

    def __init__(self) -> None:
        self._seconds = counter(PRICED_SECONDS)
        self._errors = histogram(COST_ERROR)
        self._refused = counter(REFUSED)
        self._limited = counter(LIMITED)
        self._queued = counter(QUEUE_SECONDS_SPENT)
        self._spent = counter(GPU_SECONDS_SPENT)

    def enter(self, tier: str, gpu_seconds: float) -> None:
        """Count the price of an admitted request, in GPU seconds."""
        self._seconds.inc(gpu_seconds, {"tier": tier})

    def wait(self, tier: str, seconds: float) -> None:
        """Count how long a request waited in the queue."""
        add(self._queued, seconds, {"tier": tier})

    def spend(self, tier: str, gpu_seconds: float) -> None:
        """Count what a finished request took, in GPU seconds."""
        add(self._spent, gpu_seconds, {"tier": tier})

    def compare(self, observations: Iterable[Observation]) -> None:
        """Count how far each stage's measured time was from its price."""
        for seen in observations:
            self._errors.observe(seen.error, {"tier": seen.tier, "stage": seen.stage})

    def refuse(self, tier: str) -> None:
        """Count a request that could not be done by its deadline."""
        self._refused.inc(1, {"tier": tier})

    def limit(self, tier: str, limit: str) -> None:
        """Count a request that exceeded this limit of its key."""
        self._limited.inc(1, {"tier": tier, "limit": limit})
