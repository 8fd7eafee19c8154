"""Compute how many replicas a tier needs: up early, down late, not for noise, to zero when idle.

`ArrivalRate` tells the rate of arriving work apart from its noise. `Scaler` turns rate and backlog
into a number of replicas. `Scaling` is what every policy implements, and `ScalingState` what it is
told. All of it is pure: the time is an argument.
"""

import logging
import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger("ray.serve")

SLOT_S = 1.0
# From the longest to the shortest. The longest is believed until a shorter one contradicts it.
WINDOWS_S = (900.0, 300.0, 120.0, 60.0, 30.0, 15.0, 7.0)
# Standard deviations by which a shorter window must differ from what the longer ones say. Work is
# heavy-tailed and the windows are looked at every second: with 3, false alarms are twice as many.
CONFIDENCE = 4.0
# If a window of at least this length says with confidence that the rate is lower, its mean is taken
# and all before it is forgotten. Otherwise a wave that is over would be paid for until it has left
# the longest window.
BELIEVED_S = 60.0
# The noise is remembered for so long, because the mix of requests changes slowly.
NOISE_MEMORY_S = 600.0
# Old slots are dropped this many at a time, because deleting at the head of a list costs its
# length.
NUM_SPARE_SLOTS = 1000
# A replica is started only if more than this part of one, and this share of all, is missing;
# otherwise a need that hovers around a whole number would start replicas for noise.
SLACK_REPLICAS = 0.25
SLACK_SHARE = 0.02
# How long an unneeded replica stays, as a share of the time to start another. A share of 1 would
# never cost more than twice what knowing the future would (the ski rental bound). But most work
# that is over does not come back so soon, and in the simulator a third met about as many deadlines.
HOLD_SHARE = 1 / 3
MIN_HOLD_S = 10.0


class ArrivalRate:
    """The rate of arriving work in replica seconds per second: the replicas that it keeps busy.

    Work comes in lumps: one request may be worth a hundred others, so a short window alone says
    little. The rate is the mean of the longest window, moved into the confidence interval of each
    shorter one in turn. So noise of a few seconds changes nothing, and a burst of ten times as much
    is seen within seconds. The noise is measured too, as the work of a typical lump (variance over
    mean). It is taken from the differences of successive seconds, which a change of the rate itself
    hardly touches.
    """

    def __init__(self) -> None:
        # The end of each slot of time, and all work that had arrived by then.
        self._ends: list[float] = []
        self._totals: list[float] = []
        self._total_s = 0.0
        self._slot_rate: float | None = None
        self._squares = self._sum_s = 0.0
        self.rate = 0.0

    def observe(self, arrived_s: float, now: float) -> None:
        """Take in that so many replica seconds of work arrived since the last call."""
        if not self._ends:
            # It is unknown since when this came, so it says nothing about the rate.
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
        """The seconds of a typical lump of arriving work: its variance over its mean."""
        return self._squares / self._sum_s if self._sum_s else 0.0

    def wave(self, rate: float, within_s: float) -> float:
        """Return one standard deviation of the mean rate over `within_s` seconds."""
        return math.sqrt(self.lump_s * rate / within_s)

    def _rate(self, now: float) -> float:
        rate = math.inf
        for window_s in WINDOWS_S:
            # If there is less history than the longest window, all of it counts as that window.
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
        """Return the rates that this mean does not contradict (Wilson's interval, for a rate)."""
        breadth = CONFIDENCE**2 * self.lump_s / length_s
        middle = mean + breadth / 2
        half = math.sqrt(breadth * mean + breadth**2 / 4)
        return middle - half, middle + half

    def _forget(self, num_slots: int) -> None:
        del self._ends[:num_slots]
        del self._totals[:num_slots]

    def _learn_noise(self, length_s: float, work_s: float) -> None:
        kept = math.exp(-length_s / NOISE_MEMORY_S)
        rate_before = work_s / length_s if self._slot_rate is None else self._slot_rate
        self._slot_rate = work_s / length_s
        self._squares = self._squares * kept + (work_s - rate_before * length_s) ** 2 / 2
        self._sum_s = self._sum_s * kept + work_s


@dataclass(frozen=True, slots=True)
class ScalingState:
    """A tier at one moment, in replica seconds of work.

    `current` replicas are up and `starting` ones in their cold start. `arrived_s` arrived since the
    last call, refused requests included. `waiting_s` is None while the ledger has not answered.
    `is_asked_for`: a request was refused because no replica is up.
    """

    now: float
    current: int
    starting: int
    waiting_s: float | None
    running_s: float
    arrived_s: float
    min_replicas: int
    max_replicas: int
    is_asked_for: bool = False


def target_of(state: ScalingState) -> int:
    """Return the last target: the replicas that are up and those that are starting."""
    return state.current + state.starting


class Scaling(Protocol):
    """A policy that is asked periodically how many replicas a tier should have."""

    def replicas(self, state: ScalingState) -> int:
        """Return the number of replicas wanted, those that are starting included."""


@dataclass(frozen=True)
class ScalingRules:
    """The scaling settings of a tier.

    `target_wait_s`: how long a request may wait; a backlog should be gone within it.
    `cold_start_s`: seconds from asking for a replica to its first request, loading included.
    `headroom`: replicas to spare, in standard deviations of the arriving work.
    `hold_s`: how long a replica stays after it was last needed; None is a third of `cold_start_s`.
    `idle_s`: after so long without work the last replica goes, if the bounds allow zero.
    """

    target_wait_s: float = 5.0
    cold_start_s: float = 60.0
    headroom: float = 0.5
    hold_s: float | None = None
    idle_s: float = 300.0

    def __post_init__(self) -> None:
        if self.target_wait_s <= 0:
            raise ValueError(f"target_wait_s must be above 0, not {self.target_wait_s:g}")
        for name in ("cold_start_s", "headroom", "hold_s", "idle_s"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, as {value:g} is")

    @property
    def stay_s(self) -> float:
        """How long an unneeded replica stays: `hold_s`, or its default."""
        if self.hold_s is None:
            return max(MIN_HOLD_S, HOLD_SHARE * self.cold_start_s)
        return self.hold_s


class Scaler:
    """The scaling policy of one tier: replicas for arriving work, its waves, and the backlog.

    Waiting work counts only as far as the present replicas will not have done it within the target
    wait plus the time that another replica would take to start.
    """

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._demand = ArrivalRate()
        # (when, replicas needed then): the largest of the last `stay_s`, in falling order.
        self._needs: deque[tuple[float, float]] = deque()
        self._began: float | None = None
        self._busy_at = 0.0
        # What the need of the last moment was made of, in replicas.
        self.causes: dict[str, float] = {}

    def replicas(self, state: ScalingState) -> int:
        """Return the number of replicas wanted, starting ones included, within the bounds."""
        if state.waiting_s is None:
            # What was needed meanwhile is unknown too, so the hold begins anew: no replica may go
            # merely because the ledger did not answer.
            self._began = self._busy_at = state.now
            return target_of(state)
        if self._began is None:
            self._began = self._busy_at = state.now
        self._demand.observe(state.arrived_s, state.now)
        need = self.need(state, state.waiting_s)
        wanted = self._steady(need, state)
        if self._is_idle(state):
            wanted = 0
        elif target_of(state) or state.arrived_s or state.waiting_s or state.is_asked_for:
            # Also if every request was refused: without a replica all of them always would be.
            wanted = max(wanted, 1)
        return min(max(wanted, state.min_replicas), state.max_replicas)

    def need(self, state: ScalingState, waiting_s: float) -> float:
        """Return how many replicas this moment needs, as a fraction."""
        rules = self._rules
        rate = self._demand.rate
        wave = rules.headroom * self._demand.wave(rate, rules.target_wait_s)
        # Replicas that are up work on the backlog until new ones have started.
        within_s = rules.target_wait_s + (rules.cold_start_s if state.current else 0.0)
        done_s = max(0.0, target_of(state) - rate) * within_s
        backlog = max(0.0, waiting_s - done_s) / within_s
        self.causes = {"arrivals": rate, "waves": wave, "backlog": backlog}
        return rate + wave + backlog

    def _steady(self, need: float, state: ScalingState) -> int:
        """Return the new target: up at once, down only to the largest need of the last `stay_s`."""
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((state.now, need))
        while self._needs[0][0] < state.now - self._rules.stay_s:
            self._needs.popleft()
        slack = max(SLACK_REPLICAS, SLACK_SHARE * target_of(state))
        least = math.ceil(need - slack)
        most = math.ceil(self._needs[0][1])
        if self._began is None or state.now - self._began < self._rules.stay_s:
            most = max(most, target_of(state))
        return min(max(target_of(state), least), most)

    def _is_idle(self, state: ScalingState) -> bool:
        if state.arrived_s or state.waiting_s or state.running_s or state.is_asked_for:
            self._busy_at = state.now
        return state.now - self._busy_at >= self._rules.idle_s


class LastGoodTarget:
    """A guard around another policy: if that fails or answers nonsense, the target stays.

    A policy that raises would keep Serve's controller from deploying any application.
    """

    def __init__(self, policy: Scaling) -> None:
        self._policy = policy
        self._is_failing = False

    def replicas(self, state: ScalingState) -> int:
        """Return the policy's answer within the bounds, or the present target; never raise."""
        try:
            wanted = int(self._policy.replicas(state))
        except Exception:
            if not self._is_failing:
                logger.exception(
                    "a scaling policy failed: the target stays at %d", target_of(state)
                )
            self._is_failing = True
            return target_of(state)
        self._is_failing = False
        return min(max(wanted, state.min_replicas), state.max_replicas)
