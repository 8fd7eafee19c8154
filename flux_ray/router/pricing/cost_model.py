"""Predict what a request will take on a replica of its tier, learning from what requests took.

`CostModel` multiplies the roofline's price of each stage by a ratio: the median of measured over
estimated seconds (`Calibration`). Ratios are kept by stage, and by size in buckets of half an
octave, so there are never more than NUM_BUCKETS windows of WINDOW ratios, whatever sizes arrive. A
window holds the newest observations by time; so gateways can merge what each of them measured in
any order, and repeatedly. `affinity_of` names what of a request a replica may have in its cache.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from flux_ray.errors import TierUnavailable
from flux_ray.request import ImageRequest, StageTimes, name_of_prompt
from flux_ray.router.pricing.cost import (
    Cost,
    ReplicaSpec,
    RequestShape,
    encode_parts_s,
    kept_bytes,
    price,
    work_of,
)

Stage = Literal["encode", "denoise", "decode"]

# A median follows a change once it fills more than half of the window: after 8 observations. So up
# to seven of 15 may be nonsense without harm.
WINDOW = 15
# A single first observation may be of a cold start.
MIN_OBSERVATIONS = 3
BUCKETS_PER_OCTAVE = 2
NUM_BUCKETS = 64


@dataclass(frozen=True)
class Observation:
    """One measured stage of one request, in seconds per step, per image or per prompt.

    `size` is what the stage works on: tokens of a step, pixels of an image, or pixels of all
    references. `prior_s` is the roofline's prediction, `predicted_s` the corrected one.
    """

    tier: str
    stage: Stage
    size: int
    prior_s: float
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Measured seconds over the roofline's, from which the model learns."""
        return self.measured_s / self.prior_s

    @property
    def error(self) -> float:
        """|ln(measured / predicted)|: the relative error if small; half and twice are as wrong."""
        return abs(math.log(self.measured_s / self.predicted_s))


class Ratio(NamedTuple):
    """A measured ratio, and when it was measured in seconds since 1970."""

    at_s: float
    value: float


class CalibrationRow(NamedTuple):
    """One window of one stage of a tier in one layout, as plain numbers and strings."""

    tier: str
    layout: str
    stage: str
    bucket: int
    ratios: tuple[Ratio, ...]


# Gateways share this, and it outlives them. `restore` also takes it as JSON returns it.
Snapshot = tuple[CalibrationRow, ...]


def bucket_of(size: int) -> int:
    """Return the bucket of a size: 0 for nothing, then two per octave, the last without an end."""
    if size < 1:
        return 0
    return min(1 + round(BUCKETS_PER_OCTAVE * math.log2(size)), NUM_BUCKETS - 1)


def newest(ratios: Iterable[Ratio]) -> tuple[Ratio, ...]:
    """Return the newest WINDOW ratios, oldest first, without duplicates."""
    return tuple(sorted(set(ratios))[-WINDOW:])


def merged(*snapshots: Snapshot) -> Snapshot:
    """Merge the snapshots of several gateways into one."""
    windows: dict[tuple[str, str, str, int], tuple[Ratio, ...]] = {}
    for row in (CalibrationRow(*row) for snapshot in snapshots for row in snapshot):
        key = (row.tier, row.layout, row.stage, row.bucket)
        ratios = (Ratio(*ratio) for ratio in row.ratios)
        windows[key] = newest((*windows.get(key, ()), *ratios))
    return tuple(CalibrationRow(*key, ratios) for key, ratios in sorted(windows.items()))


class Calibration:
    """The ratios measured for one stage of one tier in one layout, and their medians by size."""

    def __init__(self) -> None:
        self.windows: dict[int, tuple[Ratio, ...]] = {}
        self._medians: dict[int, float] = {}

    def ratio(self, size: int) -> float:
        """Return the factor by which to multiply the roofline's seconds for that size.

        It is the median of the size's own bucket, or of the nearest bucket with enough
        observations, or of all observations together; 1 if there are too few.
        """
        bucket = bucket_of(size)
        if bucket in self._medians:
            return self._medians[bucket]
        if self._medians:
            return self._medians[min(self._medians, key=lambda known: abs(known - bucket))]
        everything = [ratio.value for window in self.windows.values() for ratio in window]
        return statistics.median(everything) if len(everything) >= MIN_OBSERVATIONS else 1.0

    def add(self, observation: Observation, now_s: float) -> None:
        """Learn from one observation; ignore one whose ratio is not positive and finite."""
        ratio = observation.ratio
        if not (math.isfinite(ratio) and ratio > 0):
            return
        bucket = bucket_of(observation.size)
        window = self.windows.get(bucket, ())
        # Even if a clock was set back or another gateway's is ahead, this one is the newest: as the
        # oldest it would be dropped from a full window, and nothing would be learned.
        at_s = max(now_s, math.nextafter(window[-1].at_s, math.inf)) if window else now_s
        self.merge(bucket, (Ratio(at_s, ratio),))

    def merge(self, bucket: int, ratios: Iterable[Ratio]) -> None:
        """Add ratios that another gateway has measured to the bucket's window."""
        window = newest((*self.windows.get(bucket, ()), *ratios))
        self.windows[bucket] = window
        if len(window) >= MIN_OBSERVATIONS:
            self._medians[bucket] = statistics.median(ratio.value for ratio in window)


STAGES: tuple[Stage, ...] = get_args(Stage)


def sizes_of(work: RequestShape) -> dict[Stage, int]:
    """Return the size that the time of each stage depends on: pixels, or tokens to denoise."""
    return {
        "encode": work.encoded_pixels,
        "denoise": work.num_tokens,
        "decode": work.pixels,
    }


def num_rounds(work: RequestShape) -> dict[Stage, int]:
    """Return how often each stage is run: encoding once, denoising once per step of an image.

    Ratios are learned per round, so that they do not depend on the number of steps or images.
    """
    return {
        "encode": 1,
        "denoise": work.num_steps * work.num_images,
        "decode": work.num_decoded,
    }


class CostModel:
    """The prices of the tiers that are served, each in its layout.

    Each gateway has one, used from its event loop. Gateways share what they learn by passing each
    other's `snapshot` to `restore`, through the ledger; a new gateway starts with what
    the others know.
    """

    def __init__(
        self, layouts: Mapping[str, ReplicaSpec], clock: Callable[[], float] = time.time
    ) -> None:
        self.layouts = dict(layouts)
        self._clock = clock
        # All layouts that a tier has or had, by name: what was measured in one layout says nothing
        # about another.
        self._named: dict[tuple[str, str], ReplicaSpec] = {}
        self._learned: defaultdict[tuple[str, ReplicaSpec, str], Calibration] = defaultdict(
            Calibration
        )

    def lay_out(self, tier: str, layout: ReplicaSpec, name: str = "") -> None:
        """Price the tier's requests by this layout from now on.

        `name` is how results of its replicas refer to the layout.
        """
        self.layouts[tier] = layout
        if name:
            self._named[tier, name] = layout

    def price(self, request: ImageRequest) -> Cost:
        """Return the price in replica seconds; raise TierUnavailable for a tier not served here."""
        return self.price_work(work_of(request))

    def price_work(self, work: RequestShape) -> Cost:
        """Return the price of a request of which only the shape is known, as `price` does."""
        if work.tier not in self.layouts:
            raise TierUnavailable(f"{work.tier} is not served here", "model")
        return self._price_in(self.layouts[work.tier], work)

    def on_all_cards(self, tier: str, seconds: float, name: str = "") -> float:
        """Convert replica seconds into GPU seconds, for quotas and for comparing tiers.

        `name` is that of the replica's layout, if it is known; otherwise the tier's newest counts.
        """
        return seconds * self._named.get((tier, name), self.layouts[tier]).num_ranks

    def encode_parts_s(self, request: ImageRequest) -> tuple[float, float]:
        """Return the seconds that cached prompts, and cached references, save a replica."""
        work, layout = work_of(request), self.layouts[request.tier]
        if not layout.has_cache:
            return 0.0, 0.0
        ratio = self._learned[work.tier, layout, "encode"].ratio(sizes_of(work)["encode"])
        prompt_s, references_s = encode_parts_s(work, layout)
        if kept_bytes(work, layout) > layout.cache_bytes:
            references_s = 0.0
        # A shared text encoder caches the prompt for all replicas, so none is better than another.
        return 0.0 if layout.is_encoder_shared else prompt_s * ratio, references_s * ratio

    def learn(
        self, request: ImageRequest, times: StageTimes, name: str = ""
    ) -> tuple[Observation, ...]:
        """Learn from the times of a request, and return what was learned.

        The `error` of each observation is that of the price before. `name` is that of its
        replica's layout; from a layout that `lay_out` was not told of, nothing is learned.
        """
        return self.learn_work(work_of(request), times, name)

    def learn_work(
        self, work: RequestShape, times: StageTimes, name: str = ""
    ) -> tuple[Observation, ...]:
        """Learn from a request of which only the shape is known, as `learn` does.

        Stages whose time is not a positive number are left out, and so is encoding if the replica
        had the result in its cache.
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
        """Return all that was learned, as plain values that JSON can hold."""
        return merged(
            tuple(
                CalibrationRow(tier, repr(layout), stage, bucket, window)
                for (tier, layout, stage), calibration in self._learned.items()
                for bucket, window in calibration.windows.items()
            )
        )

    def restore(self, snapshot: Any) -> None:
        """Merge a snapshot, or the JSON of one, into what is known.

        Rows of other tiers, and of layouts that no replica of a tier has told of, are left out.
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
    """Return the seconds of this stage."""
    seconds: float = getattr(value, f"{stage}_s")
    return seconds


def is_time(seconds: float) -> bool:
    """Return whether this is a possible duration: positive and finite."""
    return math.isfinite(seconds) and seconds > 0


def affinity_of(request: ImageRequest, prices: CostModel) -> tuple[tuple[str, float], ...]:
    """Return what a replica may have cached: hashes of the prompts and of the references.

    Each comes with the replica seconds that it saves. An empty prompt to steer away from is not
    among them: every replica has that one.
    """
    prompt_s, references_s = prices.encode_parts_s(request)
    names = [(request.prompt_name, prompt_s)]
    if request.negative_prompt:
        away_s, _ = prices.encode_parts_s(replace(request, prompt=request.negative_prompt))
        names.append((name_of_prompt(request.negative_prompt), away_s))
    if request.references:
        names.append((request.references_name, references_s))
    return tuple((name, saved_s) for name, saved_s in names if saved_s > 0)
