"""Fairness between keys: who asks for more than a fair share of the GPU seconds there are."""

import math
from dataclasses import dataclass

# A key is over its share from here on, and within it again below 1: it does not flip all the time.
TOLERANCE = 1.2
NEGLIGIBLE_S = 1e-3


@dataclass(slots=True)
class Asked:
    """Of one key: GPU seconds asked for, fading with time; as of `at`."""

    weight: float
    seconds: float
    at: float


class Shares:
    """Max-min fair shares of the capacity, by weight and in GPU seconds.

    What each key asked for fades with `window_s`. While all of it together fits the capacity
    nobody is over. Otherwise the small demands are met in full and the others share the rest by
    weight (water filling; Bertsekas and Gallager, Data Networks, 6.5.2): those that ask for more
    than that are over their share. Bounded by the keys active in some windows.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self.window_s = window_s
        self.over: frozenset[str] = frozenset()
        self._demands: dict[str, Asked] = {}
        self._next_round = -math.inf

    def ask(self, key: str, weight: float, cost_s: float, now: float) -> None:
        """A ticket of this key arrives, whether it is taken or not."""
        demand = self._demands.get(key)
        if demand is None:
            self._demands[key] = Asked(weight, cost_s, now)
            return
        demand.seconds = self._faded(demand, now) + cost_s
        demand.weight = weight
        demand.at = now

    def is_due(self, now: float) -> bool:
        """Whether it is time to look who is over."""
        return now >= self._next_round

    def review(self, num_slots: int, now: float) -> frozenset[str]:
        """The keys whose standing has changed since the last time."""
        self._next_round = now + self.window_s / 100
        asked = {key: self._faded(demand, now) for key, demand in self._demands.items()}
        for key, seconds in asked.items():
            if seconds < NEGLIGIBLE_S:
                del self._demands[key]
        before = self.over
        if len(self._demands) < 2:
            # Behind whom should it go?
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
        """Seconds per weight that a key may have."""
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
