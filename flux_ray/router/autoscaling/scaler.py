"""How many replicas a tier needs: up early, down late, not for noise, to zero if nobody asks."""

import logging
import math
from collections import deque
from dataclasses import dataclass

from flux_ray.router.autoscaling.demand import ArrivalRate
from flux_ray.router.autoscaling.state import Scaling, ScalingState, target_of

logger = logging.getLogger("ray.serve")

# More than this part of a replica, or of all of them, must be missing before one is started.
SLACK_REPLICAS = 0.25
SLACK_SHARE = 0.02
# How long a replica stays after the last need of it, as part of the time to start another. All of
# it would never cost more than twice what knowing the future would (the ski rental bound); but most
# needs that are gone do not come back so soon, and in the simulator a third attained about as much.
HOLD_SHARE = 1 / 3
MIN_HOLD_S = 10.0


@dataclass(frozen=True)
class ScalingRules:
    """What a tier's scaling goes by.

    `target_wait_s`: a request may wait so long; a backlog is to be gone within it.
    `cold_start_s`: from asking for a replica to its first request, weights and all.
    `headroom`: standard deviations of the arriving work for which there are replicas to spare.
    `hold_s`: how long after the last need of it a replica stays. None: a third of `cold_start_s`.
    `idle_s`: with nothing to do for so long, the last replica goes, where the bounds allow none.
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
        """`hold_s`, or what stands for it."""
        if self.hold_s is None:
            return max(MIN_HOLD_S, HOLD_SHARE * self.cold_start_s)
        return self.hold_s


class Scaler:
    """Replicas for the work that arrives, its waves, and what has piled up; one for each tier.

    A replica is a whole rank group. What is waiting counts only as far as those that are there will
    not have done it in the target wait, and the time that another would take to start.
    """

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._demand = ArrivalRate()
        # (when, replicas needed then): the largest of the last `stay_s`, in falling order.
        self._needs: deque[tuple[float, float]] = deque()
        self._began: float | None = None
        self._busy_at = 0.0

    def replicas(self, state: ScalingState) -> int:
        """The number wanted, those that are starting included; within the state's bounds."""
        if state.waiting_s is None:
            # Nor does anybody know what was needed meanwhile: the hold begins anew.
            self._began = self._busy_at = state.now
            return target_of(state)
        if self._began is None:
            self._began = self._busy_at = state.now
        self._demand.observe(state.arrived_s, state.now)
        need = self.need(state, state.waiting_s)
        wanted = self._steady(need, state)
        if self._is_idle(state):
            wanted = 0
        elif target_of(state) or state.arrived_s or state.waiting_s:
            # Also where all that came was refused: with no replica it always would be.
            wanted = max(wanted, 1)
        return min(max(wanted, state.min_replicas), state.max_replicas)

    def need(self, state: ScalingState, waiting_s: float) -> float:
        """Replicas, and parts of one, for this moment."""
        rules = self._rules
        rate = self._demand.rate
        wave = rules.headroom * self._demand.wave(rate, rules.target_wait_s)
        # Those that are up work on it until others are.
        within_s = rules.target_wait_s + (rules.cold_start_s if state.current else 0.0)
        done_s = max(0.0, target_of(state) - rate) * within_s
        return rate + wave + max(0.0, waiting_s - done_s) / within_s

    def _steady(self, need: float, state: ScalingState) -> int:
        """Up for the need of now, down to the largest of the last while, else as it is."""
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
        if state.arrived_s or state.waiting_s or state.running_s:
            self._busy_at = state.now
        return state.now - self._busy_at >= self._rules.idle_s


class LastGoodTarget:
    """Asks another policy; when that fails, or answers nonsense, the target stays as it is.

    One policy that raises would keep Serve's controller from deploying any application.
    """

    def __init__(self, policy: Scaling) -> None:
        self._policy = policy
        self._is_failing = False

    def replicas(self, state: ScalingState) -> int:
        """The policy's answer within the bounds, or the present target; never raises."""
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
