"""The cost model: what a request will take on a replica of its tier, learned from what it took."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, get_args

from flux_ray.errors import TierUnavailable
from flux_ray.request import ImageRequest, StageTimes
from flux_ray.router.pricing.calibration import (
    NUM_BUCKETS,
    Calibration,
    CalibrationRow,
    Observation,
    Ratio,
    Snapshot,
    Stage,
    merged,
)
from flux_ray.router.pricing.cost import (
    Cost,
    ReplicaSpec,
    RequestShape,
    encode_parts_s,
    price,
    work_of,
)

STAGES: tuple[Stage, ...] = get_args(Stage)


def sizes_of(work: RequestShape) -> dict[Stage, int]:
    """What each stage's time goes by."""
    return {
        "encode": work.encoded_pixels,
        "denoise": work.num_tokens,
        "decode": work.pixels,
    }


def num_rounds(work: RequestShape) -> dict[Stage, int]:
    """How often a request goes through each stage: once, a step of an image, a picture of it.

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
        """The same, of what is known of a request without its prompt and pictures."""
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
