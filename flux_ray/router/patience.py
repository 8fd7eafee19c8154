"""How long a ticket may wait: no longer than keeps long and short work equally well served."""

import math

# Decisions that the averages look back on.
WINDOW = 400
ENOUGH = 30
# What a decision changes; ten times as much makes it swing, a tenth is late after a burst.
GAIN = 0.02
DRIFT = 4e-5
SMALLEST, FIRST, LARGEST = 0.25, 1.5, 8.0


class Patience:
    """A limit on every ticket's slack, in multiples of the mean slack of recent tickets.

    Where deadlines are proportional to the work, a long request can wait for a replica that a
    short one cannot, and near saturation the long ones crowd out the short. The limit falls while
    the attainment weighted by seconds is above that by requests, and rises otherwise: with loose
    deadlines, or little load, it does nothing. An integral controller; all from what was decided.
    """

    def __init__(self) -> None:
        self.factor = FIRST
        self.mean_slack_s = 0.0
        self._num_seen = 0
        self._num = self._num_served = self._total_s = self._served_s = 0.0

    @property
    def limit_s(self) -> float:
        """No ticket should plan to wait for longer. Too few tickets say nothing of the work."""
        if self._num_seen < ENOUGH:
            return math.inf
        return self.factor * self.mean_slack_s

    def see(self, slack_s: float) -> None:
        """A ticket arrives, that could wait as long by its deadline."""
        self._num_seen = min(self._num_seen + 1, WINDOW)
        self.mean_slack_s += (max(slack_s, 0.0) - self.mean_slack_s) / self._num_seen

    def decide(self, cost_s: float, is_served: bool) -> None:
        """A ticket was granted, or refused now or earlier."""
        keep = 1 - 1 / WINDOW
        self._num = self._num * keep + 1
        self._total_s = self._total_s * keep + cost_s
        self._num_served *= keep
        self._served_s *= keep
        if is_served:
            self._num_served += 1
            self._served_s += cost_s
        by_seconds = self._served_s / self._total_s if self._total_s else 0.0
        favour = by_seconds - self._num_served / self._num
        changed = self.factor * math.exp(DRIFT - GAIN * favour)
        self.factor = min(max(changed, SMALLEST), LARGEST)
