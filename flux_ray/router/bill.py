"""What a gateway counts: the GPU seconds that it sold, how wrong the prices were, and refusals."""

from collections.abc import Iterable

from flux_ray.meter import counter, histogram
from flux_ray.metrics import COST_ERROR, LIMITED, PRICED_SECONDS, REFUSED
from flux_ray.router.calibration import Observation


class Bill:
    """One for each gateway."""

    def __init__(self) -> None:
        self._seconds = counter(PRICED_SECONDS)
        self._errors = histogram(COST_ERROR)
        self._refused = counter(REFUSED)
        self._limited = counter(LIMITED)

    def enter(self, tier: str, gpu_seconds: float) -> None:
        """A request was taken in at that price."""
        self._seconds.inc(gpu_seconds, {"tier": tier})

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
