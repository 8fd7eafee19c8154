"""How much longer stages really take than the roofline says: medians of what replicas measured.

Everything is kept by stage and by size in buckets of half an octave: never more than NUM_BUCKETS
windows of WINDOW ratios, whatever sizes arrive. Windows are the newest observations by time, so
that merging them is the same in any order, and as often as one likes.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Stage = Literal["encode", "denoise", "decode"]

# A change shows when it is more than half of a window: after 8 observations. Seven of 15 may be
# nonsense.
WINDOW = 15
# A single first one may be of a cold start.
MIN_OBSERVATIONS = 3
BUCKETS_PER_OCTAVE = 2
NUM_BUCKETS = 64


@dataclass(frozen=True)
class Observation:
    """A stage of one request, in seconds of one step, one picture or one prompt.

    `size` is what the stage works on: tokens of a step, pixels of a picture, of all references.
    `prior_s` is the roofline's prediction, `predicted_s` the corrected one.
    """

    tier: str
    stage: Stage
    size: int
    prior_s: float
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Of what was measured to the prior: what is learned."""
        return self.measured_s / self.prior_s

    @property
    def error(self) -> float:
        """|ln(measured / predicted)|: near 0 the relative error, and as large for half as twice."""
        return abs(math.log(self.measured_s / self.predicted_s))


class Ratio(NamedTuple):
    """A measured ratio and when, in seconds since 1970."""

    at_s: float
    value: float


class CalibrationRow(NamedTuple):
    """One window of one tier in one layout: plain numbers and words."""

    tier: str
    layout: str
    stage: str
    bucket: int
    ratios: tuple[Ratio, ...]


# What gateways share and what outlives them; `restore` also takes it as JSON gives it back.
Snapshot = tuple[CalibrationRow, ...]


def bucket_of(size: int) -> int:
    """0 for nothing, then two an octave; the last takes whatever is larger."""
    if size < 1:
        return 0
    return min(1 + round(BUCKETS_PER_OCTAVE * math.log2(size)), NUM_BUCKETS - 1)


def newest(ratios: Iterable[Ratio]) -> tuple[Ratio, ...]:
    """A window of them, oldest first, each once."""
    return tuple(sorted(set(ratios))[-WINDOW:])


def merged(*snapshots: Snapshot) -> Snapshot:
    """What several gateways know, as one."""
    windows: dict[tuple[str, str, str, int], tuple[Ratio, ...]] = {}
    for row in (CalibrationRow(*row) for snapshot in snapshots for row in snapshot):
        key = (row.tier, row.layout, row.stage, row.bucket)
        ratios = (Ratio(*ratio) for ratio in row.ratios)
        windows[key] = newest((*windows.get(key, ()), *ratios))
    return tuple(CalibrationRow(*key, ratios) for key, ratios in sorted(windows.items()))


class Calibration:
    """What was measured of one stage of one tier in one layout."""

    def __init__(self) -> None:
        self.windows: dict[int, tuple[Ratio, ...]] = {}
        self._medians: dict[int, float] = {}

    def ratio(self, size: int) -> float:
        """By which the prior of that size is to be multiplied.

        The size's own bucket, else the nearest that has enough, else all together, else 1.
        """
        bucket = bucket_of(size)
        if bucket in self._medians:
            return self._medians[bucket]
        if self._medians:
            return self._medians[min(self._medians, key=lambda known: abs(known - bucket))]
        everything = [ratio.value for window in self.windows.values() for ratio in window]
        return statistics.median(everything) if len(everything) >= MIN_OBSERVATIONS else 1.0

    def add(self, observation: Observation, now_s: float) -> None:
        """Learn from one observation; one that cannot be a time of anything is ignored."""
        ratio = observation.ratio
        if not (math.isfinite(ratio) and ratio > 0):
            return
        bucket = bucket_of(observation.size)
        window = self.windows.get(bucket, ())
        # Not the oldest, even if a clock was set back or another gateway's is ahead.
        at_s = max(now_s, math.nextafter(window[-1].at_s, math.inf)) if window else now_s
        self.merge(bucket, (Ratio(at_s, ratio),))

    def merge(self, bucket: int, ratios: Iterable[Ratio]) -> None:
        """Learn what somebody else has measured."""
        window = newest((*self.windows.get(bucket, ()), *ratios))
        self.windows[bucket] = window
        if len(window) >= MIN_OBSERVATIONS:
            self._medians[bucket] = statistics.median(ratio.value for ratio in window)
