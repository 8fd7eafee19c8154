"""How much work arrives: its rate, told apart from its noise."""

import math
from bisect import bisect_right

SLOT_S = 1.0
# From the longest to the shortest. The longest is what is believed while nothing contradicts it.
WINDOWS_S = (900.0, 300.0, 120.0, 60.0, 30.0, 15.0, 7.0)
# Standard deviations by which a shorter window must differ from what the longer ones say. Work is
# heavy-tailed and the windows are looked at every second: with 3, false alarms are twice as many.
CONFIDENCE = 4.0
# A window of this length that says with confidence that it is less is believed as it is, and what
# was before it is forgotten: what is over should not be paid for as long as the longest window.
BELIEVED_S = 60.0
# How much a gust of noise is remembered: the mix of requests changes slowly.
NOISE_MEMORY_S = 600.0
# Old slots are dropped so many at a time.
NUM_SPARE_SLOTS = 1000


class ArrivalRate:
    """The rate of arriving work in seconds a second: replicas that would never be idle.

    Work comes in lumps: one request may be worth a hundred others, so that a short window alone
    says little. The rate is the mean of the longest window, moved into the confidence interval of
    each shorter one in turn: what a few seconds cannot tell from noise changes nothing, and a burst
    of ten times as much is seen in seconds. The noise is measured too, as the work of a typical
    lump (variance over mean), from the differences of successive seconds, which a change of the
    rate itself hardly touches.
    """

    def __init__(self) -> None:
        # Ends of the slots, and all work until then.
        self._ends: list[float] = []
        self._totals: list[float] = []
        self._total_s = 0.0
        self._slot_rate: float | None = None
        self._squares = self._sum_s = 0.0
        self.rate = 0.0

    def observe(self, arrived_s: float, now: float) -> None:
        """So many seconds of work arrived since the last call."""
        if not self._ends:
            # In how long a time this came, nobody knows.
            self._ends, self._totals = [now], [0.0]
            return
        self._total_s += arrived_s
        length_s = now - self._ends[-1]
        if length_s >= SLOT_S:
            self._learn_noise(length_s, self._total_s - self._totals[-1])
            self._ends.append(now)
            self._totals.append(self._total_s)
            self.rate = self._rate(now)
            self._forget(max(0, bisect_right(self._ends, now - WINDOWS_S[0]) - NUM_SPARE_SLOTS))

    @property
    def lump_s(self) -> float:
        """Variance over mean of the arriving work: the seconds of a typical lump of it."""
        return self._squares / self._sum_s if self._sum_s else 0.0

    def wave(self, rate: float, within_s: float) -> float:
        """One standard deviation of the rate's mean over a time."""
        return math.sqrt(self.lump_s * rate / within_s)

    def _rate(self, now: float) -> float:
        rate = math.inf
        for window_s in WINDOWS_S:
            # What there is counts as the longest window.
            first = max(0, bisect_right(self._ends, now - window_s) - 1)
            length_s = now - self._ends[first]
            mean = (self._total_s - self._totals[first]) / length_s
            if rate == math.inf:
                rate = mean
            least, most = self._interval(length_s, mean)
            if rate > most and length_s >= BELIEVED_S:
                rate = mean
                self._forget(first)
            rate = min(max(rate, least), most)
        return rate

    def _interval(self, length_s: float, mean: float) -> tuple[float, float]:
        """The rates under which such a mean is no surprise (Wilson's interval, of a rate)."""
        breadth = CONFIDENCE**2 * self.lump_s / length_s
        middle = mean + breadth / 2
        half = math.sqrt(breadth * mean + breadth**2 / 4)
        return middle - half, middle + half

    def _forget(self, num_slots: int) -> None:
        """The oldest ones."""
        del self._ends[:num_slots]
        del self._totals[:num_slots]

    def _learn_noise(self, length_s: float, work_s: float) -> None:
        kept = math.exp(-length_s / NOISE_MEMORY_S)
        rate_before = work_s / length_s if self._slot_rate is None else self._slot_rate
        self._slot_rate = work_s / length_s
        self._squares = self._squares * kept + (work_s - rate_before * length_s) ** 2 / 2
        self._sum_s = self._sum_s * kept + work_s
