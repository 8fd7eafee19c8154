"""The cost model: what a request will take on a replica of its tier, learned from what it took."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, get_args

from flux_ray.errors import TierUnavailable
from flux_ray.request import ImageRequest, StageTimes
from flux_ray.router.calibration import (
    NUM_BUCKETS,
    Calibration,
    Observation,
    Ratio,
    Row,
    Snapshot,
    Stage,
    merged,
)
from flux_ray.router.cost import Cost, Layout, Work, encode_parts_s, price, work_of

STAGES: tuple[Stage, ...] = get_args(Stage)


def sizes_of(work: Work) -> dict[Stage, int]:
    """What each stage's time goes by."""
    return {
        "encode": work.encoded_pixels,
        "denoise": work.num_tokens,
        "decode": work.pixels,
    }


def num_rounds(work: Work) -> dict[Stage, int]:
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
        self, layouts: Mapping[str, Layout], clock: Callable[[], float] = time.time
    ) -> None:
        self.layouts = dict(layouts)
        self._clock = clock
        self._learned: dict[tuple[str, str], Calibration] = {
            (tier, stage): Calibration() for tier in layouts for stage in STAGES
        }

    def lay_out(self, tier: str, layout: Layout) -> None:
        """The tier's replicas are laid out so. What was learned of another layout is forgotten."""
        if self.layouts[tier] != layout:
            self.layouts[tier] = layout
            self._learned |= {(tier, stage): Calibration() for stage in STAGES}

    def price(self, request: ImageRequest) -> Cost:
        """Seconds of one replica; TierUnavailable for a tier that is not served here."""
        return self.price_work(work_of(request))

    def price_work(self, work: Work) -> Cost:
        """The same, of what is known of a request without its prompt and pictures."""
        prior, sizes = self._prior(work), sizes_of(work)
        ratios = {stage: self._learned[work.tier, stage].ratio(sizes[stage]) for stage in STAGES}
        return Cost(
            encode_s=prior.encode_s * ratios["encode"],
            denoise_s=prior.denoise_s * ratios["denoise"],
            decode_s=prior.decode_s * ratios["decode"],
        )

    def on_all_cards(self, tier: str, seconds: float) -> float:
        """GPU seconds of a replica's seconds: for quotas, and for tiers beside each other."""
        return seconds * self.layouts[tier].num_ranks

    def encode_parts_s(self, request: ImageRequest) -> tuple[float, float]:
        """Of its encoding, what a replica saves that knows the prompt, and the references."""
        work, layout = work_of(request), self.layouts[request.tier]
        if not layout.has_cache:
            return 0.0, 0.0
        ratio = self._learned[work.tier, "encode"].ratio(sizes_of(work)["encode"])
        prompt_s, references_s = encode_parts_s(work, layout)
        # A shared text encoder knows it for all replicas.
        return 0.0 if layout.is_encoder_shared else prompt_s * ratio, references_s * ratio

    def learn(self, request: ImageRequest, times: StageTimes) -> tuple[Observation, ...]:
        """Take in what a request took; each observation's `error` is that of the price before."""
        return self.learn_work(work_of(request), times)

    def learn_work(self, work: Work, times: StageTimes) -> tuple[Observation, ...]:
        """The same. A stage that took no time, or no number of seconds, teaches nothing.

        Nor does encoding what a replica knew.
        """
        observations = tuple(
            seen
            for seen in self._observations(work, times)
            if is_time(seen.measured_s) and not (times.is_cached and seen.stage == "encode")
        )
        now_s = self._clock()
        for seen in observations:
            self._learned[work.tier, seen.stage].add(seen, now_s)
        return observations

    def snapshot(self) -> Snapshot:
        """All that was learned, as plain values that JSON takes."""
        return merged(
            tuple(
                Row(tier, repr(self.layouts[tier]), stage, bucket, window)
                for (tier, stage), calibration in self._learned.items()
                for bucket, window in calibration.windows.items()
            )
        )

    def restore(self, snapshot: Any) -> None:
        """Learn from a snapshot, or from JSON of one, besides what is known.

        What it says of other tiers, and of tiers that have another layout by now, is left out.
        """
        for row in (Row(*row) for row in snapshot):
            layout = self.layouts.get(row.tier)
            known = row.stage in STAGES and 0 <= row.bucket < NUM_BUCKETS
            if known and repr(layout) == row.layout:
                ratios = (Ratio(*ratio) for ratio in row.ratios)
                calibration = self._learned[row.tier, row.stage]
                calibration.merge(row.bucket, (each for each in ratios if is_time(each.value)))

    def _prior(self, work: Work) -> Cost:
        try:
            return price(work, self.layouts[work.tier])
        except KeyError:
            raise TierUnavailable(f"{work.tier} is not served here", "model") from None

    def _observations(self, work: Work, times: StageTimes) -> tuple[Observation, ...]:
        prior, predicted = self._prior(work), self.price_work(work)
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
