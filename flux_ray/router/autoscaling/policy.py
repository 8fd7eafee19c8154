"""The autoscaling policy that Serve calls: it feeds the ledger's backlog to the scaler."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

from flux_ray.meter import SHOW_S, gauge
from flux_ray.metrics import NEEDED_REPLICAS, WANTED_REPLICAS
from flux_ray.router.autoscaling.gpu_budget import Budgeted, BudgetTerms, cluster_budget
from flux_ray.router.autoscaling.scaler import (
    LastGoodTarget,
    Scaler,
    Scaling,
    ScalingRules,
    ScalingState,
)
from flux_ray.router.ledger.messages import Backlog
from flux_ray.router.ledger.remote import RemoteLedger
from flux_ray.router.ledger.service import LedgerLost, LedgerService

logger = logging.getLogger("ray.serve")

POLL_S = 0.5
# An answer of the ledger that is older counts for nothing; the target then stays as it is.
MAX_AGE_S = 10.0


class ScalingGauges:
    """What the scaling policy of one tier wants, and why, as metrics of Serve's controller."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._wanted, self._needed = gauge(WANTED_REPLICAS), gauge(NEEDED_REPLICAS)
        self._shown_at = float("-inf")

    def show(self, wanted: int, causes: Mapping[str, float], now: float) -> None:
        """Set the gauges if it is time to: the replicas wanted, and the parts of the need."""
        if now - self._shown_at < SHOW_S:
            return
        self._shown_at = now
        self._wanted.set(wanted, {"tier": self._tier})
        for cause, replicas in causes.items():
            self._needed.set(replicas, {"tier": self._tier, "cause": cause})


class LedgerPolicy:
    """The scaling policy of one tier, which Serve's controller calls ten times a second.

    It answers from the ledger's last answer and asks again in a task of its own, because the
    controller must not wait. `rules` are the fields of ScalingRules, `terms` those of BudgetTerms,
    if the tier shares a GPU budget.
    """

    def __init__(
        self, tier: str, rules: dict[str, Any], terms: dict[str, Any] | None = None
    ) -> None:
        self._tier = tier
        self._cold_start_s = ScalingRules(**rules).cold_start_s
        self._need = Scaler(ScalingRules(**rules))
        self._scaler: Scaling = LastGoodTarget(self._need)
        if terms is not None:
            # Around LastGoodTarget: a tier whose scaler fails must still tell the budget what it
            # holds, or its GPUs would be given to others.
            self._scaler = Budgeted(self._scaler, cluster_budget(), tier, BudgetTerms(**terms))
        self._gauges = ScalingGauges(tier)
        self._ledger: LedgerService = RemoteLedger()
        self._backlog: Backlog | None = None
        # All work up to the ledger's last answer; None before the first.
        self._counted_s: float | None = None
        self._is_failing = False
        self._answered_at = self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas that Serve should bring the tier to; never raise."""
        now = time.monotonic()
        try:
            self._ask(now)
            state = self._state(context, now)
            wanted = self._scaler.replicas(state)
            self._is_failing = False
            wanted = min(max(wanted, state.min_replicas), state.max_replicas)
            self._gauges.show(wanted, self._need.causes, now)
            return wanted, {}
        except Exception:
            # A policy that raises keeps Serve from deploying any application at all.
            if not self._is_failing:
                logger.exception("the scaling of %s failed", self._tier)
            self._is_failing = True
            return context.target_num_replicas, {}

    def _ask(self, now: float) -> None:
        is_asking = self._asking is not None and not self._asking.done()
        if not is_asking and now - self._asked_at > POLL_S:
            self._asked_at = now
            self._asking = asyncio.get_running_loop().create_task(self._update_backlog())

    async def _update_backlog(self) -> None:
        try:
            self._backlog = await self._ledger.backlog(self._tier, self._cold_start_s)
            self._answered_at = time.monotonic()
        except LedgerLost as error:
            logger.warning("the scaling of %s keeps its target: %s", self._tier, error)

    def _state(self, context: AutoscalingContext, now: float) -> ScalingState:
        backlog = self._backlog if now - self._answered_at < MAX_AGE_S else None
        current, target = context.current_num_replicas, context.target_num_replicas
        return ScalingState(
            now=now,
            current=min(current, target),
            starting=max(0, target - current),
            waiting_s=None if backlog is None else backlog.waiting_s,
            running_s=0.0 if backlog is None else backlog.running_s,
            arrived_s=0.0 if backlog is None else self._new_work_s(backlog.arrived_s),
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
            is_asked_for=backlog is not None and backlog.is_asked_for,
        )

    def _new_work_s(self, total_s: float) -> float:
        """Return the work that arrived since the last call; a new ledger counts from zero again."""
        before_s, self._counted_s = self._counted_s, total_s
        if before_s is None:
            # It may have arrived days ago: Serve makes a new policy at every deploy.
            return 0.0
        return total_s - before_s if total_s >= before_s else total_s
