"""Serve's autoscaling policy of a tier: the ledger's GPU seconds, through the scaler."""

import asyncio
import logging
import time
from typing import Any

from ray.serve.config import AutoscalingContext

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
# What the ledger said so long ago counts for nothing: the target then stays as it is.
MAX_AGE_S = 10.0


class LedgerPolicy:
    """One for each tier, in Serve's controller, which calls it ten times a second.

    It answers from what it heard last: the controller must not wait for anybody. `terms` are of the
    GPU budget that it shares with the other tiers' policies.
    """

    def __init__(
        self, tier: str, rules: dict[str, Any], terms: dict[str, Any] | None = None
    ) -> None:
        self._tier = tier
        self._cold_start_s = ScalingRules(**rules).cold_start_s
        self._scaler: Scaling = LastGoodTarget(Scaler(ScalingRules(**rules)))
        if terms is not None:
            # Within: a tier whose scaler fails still says what it holds.
            budgeted = Budgeted(self._scaler, cluster_budget(), tier, BudgetTerms(**terms))
            self._scaler = LastGoodTarget(budgeted)
        self._ledger: LedgerService = RemoteLedger()
        self._backlog: Backlog | None = None
        self._counted_s = 0.0
        self._heard_at = self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted, for Serve to reach."""
        now = time.monotonic()
        try:
            self._ask(now)
            return self._scaler.replicas(self._state(context, now)), {}
        except Exception:
            # One policy that raises keeps Serve from deploying any application.
            logger.exception("the scaling of %s failed", self._tier)
            return context.target_num_replicas, {}

    def _ask(self, now: float) -> None:
        is_asking = self._asking is not None and not self._asking.done()
        if not is_asking and now - self._asked_at > POLL_S:
            self._asked_at = now
            self._asking = asyncio.get_running_loop().create_task(self._hear())

    async def _hear(self) -> None:
        try:
            self._backlog = await self._ledger.backlog(self._tier, self._cold_start_s)
            self._heard_at = time.monotonic()
        except LedgerLost as error:
            logger.warning("the scaling of %s keeps its target: %s", self._tier, error)

    def _state(self, context: AutoscalingContext, now: float) -> ScalingState:
        backlog = self._backlog if now - self._heard_at < MAX_AGE_S else None
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
        )

    def _new_work_s(self, total_s: float) -> float:
        """Since the last call; a ledger that was lost counts from zero again."""
        new_s = total_s - self._counted_s if total_s >= self._counted_s else total_s
        self._counted_s = total_s
        return new_s
