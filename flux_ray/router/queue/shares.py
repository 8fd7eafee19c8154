"""Find the keys that ask for more than their fair share of a tier's replica seconds."""

import math
from dataclasses import dataclass

# A key counts as over its share from 1.2 shares on, and as within it only below 1 again; with one
# threshold for both it could flip at every review.
TOLERANCE = 1.2
NEGLIGIBLE_S = 1e-3


@dataclass(slots=True)
class Asked:
    """The demand of one key: replica seconds asked for, decayed up to the time `at`."""

    weight: float
    seconds: float
    at: float


class Shares:
    """The max-min fair shares of a tier's capacity, by weight and in replica seconds.

    What each key asked for decays with `window_s`. While all demands together fit the capacity, no
    key is over its share. Otherwise small demands are met in full, and the others share the rest
    by weight (water filling; Bertsekas and Gallager, Data Networks, 6.5.2): keys that ask for more
    than that are `over`. Memory is bounded by the keys that were active in the last few windows.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self.window_s = window_s
        self.over: frozenset[str] = frozenset()
        self._demands: dict[str, Asked] = {}
        self._next_round = -math.inf

    def ask(self, key: str, weight: float, cost_s: float, now: float) -> None:
        """Add a request to its key's demand, whether it is admitted or not."""
        demand = self._demands.get(key)
        if demand is None:
            self._demands[key] = Asked(weight, cost_s, now)
            return
        demand.seconds = self._faded(demand, now) + cost_s
        demand.weight = weight
        demand.at = now

    def is_due(self, now: float) -> bool:
        """Return whether it is time for another review."""
        return now >= self._next_round

    def review(self, num_slots: int, now: float) -> frozenset[str]:
        """Decide anew which keys are over their share; return those for which that changed."""
        self._next_round = now + self.window_s / 100
        asked = {key: self._faded(demand, now) for key, demand in self._demands.items()}
        for key, seconds in asked.items():
            if seconds < NEGLIGIBLE_S:
                del self._demands[key]
        before = self.over
        if len(self._demands) < 2:
            # A single key has no other to wait behind.
            self.over = frozenset()
            return before
        level = self._level(asked, num_slots * self.window_s)
        self.over = frozenset(
            key
            for key, demand in self._demands.items()
            if asked[key] > level * demand.weight * (1 if key in before else TOLERANCE)
        )
        return before ^ self.over

    def _level(self, asked: dict[str, float], capacity_s: float) -> float:
        """Return the water level: replica seconds that each key may have, per weight."""
        weights = {key: demand.weight for key, demand in self._demands.items()}
        left_weight = sum(weights.values())
        for key in sorted(weights, key=lambda key: (asked[key] / weights[key], key)):
            if asked[key] * left_weight > capacity_s * weights[key]:
                return capacity_s / left_weight
            capacity_s -= asked[key]
            left_weight -= weights[key]
        return math.inf

    def _faded(self, demand: Asked, now: float) -> float:
        return demand.seconds * math.exp((demand.at - now) / self.window_s)
