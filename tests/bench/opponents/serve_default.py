"""Ray Serve's own default autoscaling in simulated time: replicas by the number of requests."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flux_ray.router.autoscaling.scaler import ScalingState, target_of


@dataclass(frozen=True)
class ServeSettings:
    """The fields of Serve's AutoscalingConfig of the same names, with its defaults (Ray 2.60)."""

    target_ongoing_requests: float = 2.0
    look_back_period_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    downscale_to_zero_delay_s: float | None = None
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0
    aggregation_function: Literal["mean", "max"] = "mean"


# What docs.ray.io/en/latest/serve/advanced-guides/advanced-autoscaling.html advises, and how it
# fits here: target_ongoing_requests 1 for replicas that do one request at a time ("at 3 replicas,
# your system would be able to process 30 QPS with 1 ongoing request per replica"), a lower
# upscale_delay_s for bursts, `max` "to react quickly to traffic spikes", a look-back that is short
# but longer than the 10 s between two reports. Its advice for slow starts, a longer
# downscale_delay_s than 600 s, is not followed: it costs GPU hours.
TUNED = ServeSettings(
    target_ongoing_requests=1.0,
    look_back_period_s=15.0,
    upscale_delay_s=3.0,
    aggregation_function="max",
)


class ServeDefault:
    """The rule of `ray.serve.autoscaling_policy.replica_queue_length_autoscaling_policy` (2.60.0).

    Requests that run or wait, over the target of each; a decision counts once it was wanted for
    the whole delay. `num_ongoing` says how many there are. Kinder than the original: it sees every
    second's number at once, where Serve's replicas report every ten seconds.
    """

    def __init__(self, settings: ServeSettings, num_ongoing: Callable[[], int]) -> None:
        self._settings = settings
        self._num_ongoing = num_ongoing
        # (when, how many from then on)
        self._counts: deque[tuple[float, int]] = deque()
        self._direction = 0
        self._since: float | None = None

    def replicas(self, state: ScalingState) -> int:
        """The number wanted, within the bounds."""
        total = self._total(state.now)
        wanted = self.decision(total, state.current, target_of(state), state.now)
        return min(max(wanted, state.min_replicas), state.max_replicas)

    def decision(self, total_requests: float, current: int, target: int, now: float) -> int:
        """As Serve's controller decides, before it applies the bounds."""
        if current == 0:
            # With nothing up, the first request starts some at once.
            first = math.ceil(self._settings.upscaling_factor) if total_requests > 0 else 0
            return max(first, target) or self._delayed(0, 0, now)
        # In their order, for the same rounding: 31 requests over 30 replicas can want 32.
        desired = current * (total_requests / (self._settings.target_ongoing_requests * current))
        return self._delayed(max(0, self._scaled(desired, current)), target, now)

    def _scaled(self, desired: float, current: int) -> int:
        """The gain on the difference; downwards at least by one."""
        is_more = desired > current
        settings = self._settings
        factor = settings.upscaling_factor if is_more else settings.downscaling_factor
        scaled = math.ceil(current + factor * (desired - current))
        return scaled - 1 if math.ceil(desired) < current == scaled else scaled

    def _delayed(self, desired: int, target: int, now: float) -> int:
        """The target, until another number was wanted for the whole delay."""
        direction = (desired > target) - (desired < target)
        if direction != self._direction or direction == 0:
            self._direction, self._since = direction, now
        if direction < 0 and target > 1:
            # Only the last one goes to zero.
            desired = max(1, desired)
        since = now if self._since is None else self._since
        if direction == 0 or now - since + 1e-6 < self._delay_s(direction, target):
            return target
        self._direction, self._since = 0, None
        return desired

    def _delay_s(self, direction: int, target: int) -> float:
        settings = self._settings
        if direction > 0:
            return settings.upscale_delay_s
        if target == 1 and settings.downscale_to_zero_delay_s is not None:
            return settings.downscale_to_zero_delay_s
        return settings.downscale_delay_s

    def _total(self, now: float) -> float:
        """The requests of the look-back period: their mean over time, or their most."""
        counts, begin = self._counts, now - self._settings.look_back_period_s
        counts.append((now, self._num_ongoing()))
        while len(counts) > 1 and counts[1][0] <= begin:
            counts.popleft()
        if self._settings.aggregation_function == "max" or len(counts) == 1:
            return max(count for _, count in counts)
        ends = [at for at, _ in counts][1:]
        lengths = [end - max(at, begin) for (at, _), end in zip(counts, ends, strict=False)]
        counted = zip(counts, lengths, strict=False)
        return sum(count * length for (_, count), length in counted) / sum(lengths)
