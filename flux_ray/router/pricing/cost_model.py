"""The cost model: what a request will take on a replica of its tier, learned from what it took.

How much longer stages really take than the roofline says: medians of what replicas measured.

Everything is kept by stage and by size in buckets of half an octave: never more than NUM_BUCKETS
windows of WINDOW ratios, whatever sizes arrive. Windows are the newest observations by time, so
that merging them is the same in any order, and as often as one likes.

What a request has in common with others that a replica may have encoded before.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from flux_ray.errors import TierUnavailable
from flux_ray.request import ImageRequest, StageTimes
from flux_ray.router.pricing.cost import (
    Cost,
    ReplicaSpec,
    RequestShape,
    encode_parts_s,
    price,
    work_of,
)

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
    """A stage of one request, in seconds of one step, one image or one prompt.

    `size` is what the stage works on: tokens of a step, pixels of an image, of all references.
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


STAGES: tuple[Stage, ...] = get_args(Stage)


def sizes_of(work: RequestShape) -> dict[Stage, int]:
    """What each stage's time goes by."""
    return {
        "encode": work.encoded_pixels,
        "denoise": work.num_tokens,
        "decode": work.pixels,
    }


def num_rounds(work: RequestShape) -> dict[Stage, int]:
    """How often a request goes through each stage: once, a step of an image, an image of it.

    What is learned is of one round, so that neither steps nor images come into it.
    """
    return {
        "encode": 1,
        "denoise": work.num_steps * work.num_images,
        "decode": work.num_decoded,
    }


class CostModel:
    """Prices of the tiers that are served, each in its layout.

    Several gateways share what they learn by `restore` of each other's `snapshot`, through whoever
    keeps it; so does a gateway with the one that it replaces.
    """

    def __init__(
        self, layouts: Mapping[str, ReplicaSpec], clock: Callable[[], float] = time.time
    ) -> None:
        self.layouts = dict(layouts)
        self._clock = clock
        # Of the layouts that a tier has, or had: what was measured in one says nothing of another.
        self._named: dict[tuple[str, str], ReplicaSpec] = {}
        self._learned: defaultdict[tuple[str, ReplicaSpec, str], Calibration] = defaultdict(
            Calibration
        )

    def lay_out(self, tier: str, layout: ReplicaSpec, name: str = "") -> None:
        """Price the tier's requests by this layout from now on; its results call it `name`."""
        self.layouts[tier] = layout
        if name:
            self._named[tier, name] = layout

    def price(self, request: ImageRequest) -> Cost:
        """Seconds of one replica; TierUnavailable for a tier that is not served here."""
        return self.price_work(work_of(request))

    def price_work(self, work: RequestShape) -> Cost:
        """The same, of what is known of a request without its prompt and images."""
        if work.tier not in self.layouts:
            raise TierUnavailable(f"{work.tier} is not served here", "model")
        return self._price_in(self.layouts[work.tier], work)

    def on_all_cards(self, tier: str, seconds: float, name: str = "") -> float:
        """GPU seconds of a replica's seconds: for quotas, and for tiers beside each other.

        `name` is that of its layout, where it is known.
        """
        return seconds * self._named.get((tier, name), self.layouts[tier]).num_ranks

    def encode_parts_s(self, request: ImageRequest) -> tuple[float, float]:
        """Of its encoding, what a replica saves that knows the prompt, and the references."""
        work, layout = work_of(request), self.layouts[request.tier]
        if not layout.has_cache:
            return 0.0, 0.0
        ratio = self._learned[work.tier, layout, "encode"].ratio(sizes_of(work)["encode"])
        prompt_s, references_s = encode_parts_s(work, layout)
        # A shared text encoder knows it for all replicas.
        return 0.0 if layout.is_encoder_shared else prompt_s * ratio, references_s * ratio

    def learn(
        self, request: ImageRequest, times: StageTimes, name: str = ""
    ) -> tuple[Observation, ...]:
        """Take in what a request took; each observation's `error` is that of the price before.

        `name` is that of its replica's layout: one that nobody told of teaches nothing.
        """
        return self.learn_work(work_of(request), times, name)

    def learn_work(
        self, work: RequestShape, times: StageTimes, name: str = ""
    ) -> tuple[Observation, ...]:
        """The same. A stage that took no time, or no number of seconds, teaches nothing.

        Nor does encoding what a replica knew.
        """
        layout = self._named.get((work.tier, name)) if name else self.layouts[work.tier]
        if layout is None:
            return ()
        observations = tuple(
            seen
            for seen in self._observations(layout, work, times)
            if is_time(seen.measured_s) and not (times.is_cached and seen.stage == "encode")
        )
        now_s = self._clock()
        for seen in observations:
            self._learned[work.tier, layout, seen.stage].add(seen, now_s)
        return observations

    def snapshot(self) -> Snapshot:
        """All that was learned, as plain values that JSON takes."""
        return merged(
            tuple(
                CalibrationRow(tier, repr(layout), stage, bucket, window)
                for (tier, layout, stage), calibration in self._learned.items()
                for bucket, window in calibration.windows.items()
            )
        )

    def restore(self, snapshot: Any) -> None:
        """Learn from a snapshot, or from JSON of one, besides what is known.

        What it says of other tiers, and of layouts that no replica of a tier has told of, is left
        out.
        """
        layouts = {(tier, repr(layout)): layout for tier, layout in self.layouts.items()}
        layouts |= {(tier, repr(layout)): layout for (tier, _), layout in self._named.items()}
        for row in (CalibrationRow(*row) for row in snapshot):
            layout = layouts.get((row.tier, row.layout))
            if layout is not None and row.stage in STAGES and 0 <= row.bucket < NUM_BUCKETS:
                ratios = (Ratio(*ratio) for ratio in row.ratios)
                calibration = self._learned[row.tier, layout, row.stage]
                calibration.merge(row.bucket, (each for each in ratios if is_time(each.value)))

    def _price_in(self, layout: ReplicaSpec, work: RequestShape) -> Cost:
        prior, sizes = price(work, layout), sizes_of(work)
        ratios = {
            stage: self._learned[work.tier, layout, stage].ratio(sizes[stage]) for stage in STAGES
        }
        return Cost(
            encode_s=prior.encode_s * ratios["encode"],
            denoise_s=prior.denoise_s * ratios["denoise"],
            decode_s=prior.decode_s * ratios["decode"],
        )

    def _observations(
        self, layout: ReplicaSpec, work: RequestShape, times: StageTimes
    ) -> tuple[Observation, ...]:
        prior, predicted = price(work, layout), self._price_in(layout, work)
        sizes, rounds = sizes_of(work), num_rounds(work)
        return tuple(
            Observation(
                work.tier,
                stage,
                sizes[stage],
                seconds_of(prior, stage) / rounds[stage],
                seconds_of(predicted, stage) / rounds[stage],
                seconds_of(times, stage) / rounds[stage],
            )
            for stage in STAGES
        )


def seconds_of(value: Cost | StageTimes, stage: Stage) -> float:
    """The stage's field."""
    seconds: float = getattr(value, f"{stage}_s")
    return seconds


def is_time(seconds: float) -> bool:
    """Whether a stage can have taken that long."""
    return math.isfinite(seconds) and seconds > 0


def affinity_of(request: ImageRequest, prices: CostModel) -> tuple[tuple[str, float], ...]:
    """Names of its prompt and its references, with the seconds that a replica saves by each."""
    prompt_s, references_s = prices.encode_parts_s(request)
    names = [(request.prompt_name, prompt_s)]
    if request.references:
        names.append((request.references_name, references_s))
    return tuple((name, saved_s) for name, saved_s in names if saved_s > 0)
