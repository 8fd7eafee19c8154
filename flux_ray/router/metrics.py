"""What a gateway counts: the GPU seconds that it sold, how wrong the prices were, and refusals."""

from collections.abc import Iterable

from flux_ray.meter import counter, histogram
from flux_ray.metrics import (
    COST_ERROR,
    GPU_SECONDS_SPENT,
    LIMITED,
    PRICED_SECONDS,
    QUEUE_SECONDS_SPENT,
    REFUSED,
)
from flux_ray.router.pricing.cost_model import Observation


class RouterMetrics:
    """One for each gateway."""

    def __init__(self) -> None:
        self._seconds = counter(PRICED_SECONDS)
        self._errors = histogram(COST_ERROR)
        self._refused = counter(REFUSED)
        self._limited = counter(LIMITED)
        self._queued = counter(QUEUE_SECONDS_SPENT)
        self._spent = counter(GPU_SECONDS_SPENT)

    def enter(self, tier: str, gpu_seconds: float) -> None:
        """A request was taken in at that price."""
        self._seconds.inc(gpu_seconds, {"tier": tier})

    def wait(self, tier: str, seconds: float) -> None:
        """Count how long a request waited for its turn."""
        if seconds > 0:
            self._queued.inc(seconds, {"tier": tier})

    def spend(self, tier: str, gpu_seconds: float) -> None:
        """Count what a request that was drawn took."""
        if gpu_seconds > 0:
            self._spent.inc(gpu_seconds, {"tier": tier})

    def compare(self, observations: Iterable[Observation]) -> None:
        """What was measured, beside what had been predicted."""
        for seen in observations:
            self._errors.observe(seen.error, {"tier": seen.tier, "stage": seen.stage})

    def refuse(self, tier: str) -> None:
        """A request could not be done in time."""
        self._refused.inc(1, {"tier": tier})

    def limit(self, tier: str, limit: str) -> None:
        """A request was more than its key may have."""
        self._limited.inc(1, {"tier": tier, "limit": limit})
