"""How far off the prices are: what a request may take at the least, judged by those before it."""

import math

# Requests that the estimate looks back on.
WINDOW = 200
# Below so many standard deviations a request takes so little too seldom to hope for it.
HOPED_DEVIATIONS = 1.5
LEAST_SHARE = 0.3


class EstimateError:
    """Mean and deviation of the logarithm of seconds taken over seconds estimated.

    Whoever cannot be in time by the estimate may be so in truth. While estimates are exact, nobody
    is given that hope; the more they err, the more is tried that seems too late.
    """

    def __init__(self) -> None:
        self._num = 0
        self._mean = self._variance = 0.0

    @property
    def least_share(self) -> float:
        """Of its estimate, what a request may hope to take; 1 as long as nothing is known."""
        if self._num < 2:
            return 1.0
        hoped = math.exp(self._mean - HOPED_DEVIATIONS * math.sqrt(self._variance))
        return min(max(hoped, LEAST_SHARE), 1.0)

    def note(self, taken_s: float, estimated_s: float) -> None:
        """A request is done."""
        if taken_s <= 0 or estimated_s <= 0:
            return
        self._num = min(self._num + 1, WINDOW)
        error = math.log(taken_s / estimated_s) - self._mean
        self._mean += error / self._num
        self._variance += (error * error - self._variance) / self._num
