"""The deployment graph on one page: one application a tier, and the gateway in front of them.

A Serve config file names these builders and gives their args (serve/*.yaml).
"""

import logging
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray._private.worker import global_worker
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import PROXY_CALLBACK, READ_WITH_H11, TierArgs, reads_with_h11
from flux_ray.gateway.api import build_api
from flux_ray.gateway.bfl.routes import desk_for
from flux_ray.private_files import make_folder
from flux_ray.replica.leader import Leader
from flux_ray.replica.rank_group import bundles_for, strategy_for
from flux_ray.replica.text_encoder import TextEncoder
from flux_ray.router.autoscaling.gpu_budget import BudgetTerms
from flux_ray.router.dispatch import TierHandles, learn_layouts
from flux_ray.router.ledger.client import LedgerClient
from flux_ray.router.ledger.quota_client import PriceExchange, QuotaClient
from flux_ray.router.ledger.remote import RemoteLedger
from flux_ray.router.metrics import RouterMetrics
from flux_ray.router.pricing.config_check import check_possible, drain_timeout_s
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.replica_choice import AssignedReplicaRouter
from flux_ray.router.router import Router, Terms
from flux_ray.router.trace import Recorder

logger = logging.getLogger("ray.serve")

# A leader that ended is replaced at the next check; one that hangs is killed before three of them
# are over (router/ledger/remote.py).
HEALTH_CHECK_PERIOD_S = 1
HEALTH_CHECK_TIMEOUT_S = 5


@serve.ingress()
class Gateway:
    """The replica that speaks HTTP; it reaches the tiers by their handles."""

    def __init__(self, args: GatewayArgs) -> None:
        self._args = args

    async def __serve_build_asgi_app__(self) -> FastAPI:
        args = self._args
        if not reads_with_h11():
            logger.warning(
                "requests that offer HTTP/2, like a JDK's, lose their bodies: start Ray with %s=%s",
                PROXY_CALLBACK,
                READ_WITH_H11,
            )
        prices = CostModel({tier: ReplicaSpec(args.card) for tier in args.tiers})
        cold_starts: dict[str, float] = {}
        handles = TierHandles(args.tiers, learn_layouts(prices, args.card, cold_starts))
        ledger = RemoteLedger()
        name = uuid.uuid4().hex
        # From now on it watches the tiers: the first request is priced by what they say.
        handles.reachable()
        turns = LedgerClient(ledger, handles.reachable, name, cold_starts)
        handles.follow_status(turns.lose)
        # Before the first request, too: who cannot reach the ledger is not to be sent any.
        turns.start()
        PriceExchange(ledger, prices).start()
        records = recorder_in(args.record_to, name)
        terms = Terms(args.request_timeout_s, args.deadlines)
        bill = RouterMetrics()
        turnstile = QuotaClient(ledger, name, bill.limit)
        router = Router(
            handles,
            turns,
            prices,
            bill,
            terms,
            records,
            turnstile,
            is_deployed=handles.is_deployed,
            hears_ledger=ledger.is_heard,
        )
        desk = desk_for(router, args)
        return build_api(router, args, desk=desk, is_stopping=is_stopping, proxy_sends_id=True)

    async def check_health(self) -> None:
        """Answer Serve, and whoever ends what hangs: this loop runs."""


def recorder_in(folder: Path | None, name: str) -> Recorder | None:
    """What records into that folder, which gateways of one node may share; None for none."""
    if folder is None:
        return None
    make_folder(folder)
    return Recorder(folder / f"{name}.jsonl")


def is_stopping() -> bool:
    """Whether Serve has begun to end this replica, which it tells it only after its last request.

    False where Serve does not say so in these words: then it is seen at the end only.
    """
    worker = global_worker
    replica = getattr(worker.actors.get(worker.actor_id), "_replica_impl", None)
    return bool(getattr(replica, "_shutting_down", False))


def build_gateway(args: GatewayArgs) -> Application:
    """The application that clients speak to. ValueError names a key that asks the impossible."""
    check_possible(args)
    deployment = serve.deployment(
        name="gateway",
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options={"num_cpus": args.num_cpus},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=args.drain_timeout_s,
    )(Gateway)
    return deployment.bind(args)


def build_tier(args: TierArgs) -> Application:
    """The application of one tier, reached by its handle only. Name it as the tier."""
    return tier_application(args, Leader)


def tier_application(args: TierArgs, leader: type[Leader]) -> Application:
    """The leaders of a tier, and their text encoder where they share one."""
    # Filled in: older gateways, which read the args of replicas, know it as a number.
    args = args.model_copy(update={"drain_timeout_s": drain_timeout_s(args)})
    deployment = serve.deployment(
        name=args.tier,
        **replicas_of(args),
        max_ongoing_requests=args.max_ongoing_requests,
        # The leader needs nothing: the bundles are its ranks'.
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=bundles_for(args),
        placement_group_strategy=strategy_for(args.parallel),
        request_router_config=granted_replica_first(),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_timeout_s(args),
    )(leader)
    if args.text_encoder == "colocated":
        return deployment.bind(args)
    return deployment.bind(args, text_encoder_for(args))


def replicas_of(args: TierArgs) -> dict[str, Any]:
    """How many: a number, or by the GPU seconds in the ledger, within the cluster's budget."""
    scaling = args.autoscaling
    if scaling is None:
        return {"num_replicas": args.num_replicas}
    rules = scaling.model_dump(include={"target_wait_s", "cold_start_s", "headroom", "idle_s"})
    terms = None
    # On processors it takes no GPUs, and its number is not to bind those that do.
    if scaling.gpu_budget is not None and args.num_gpus_per_replica:
        terms = asdict(BudgetTerms(scaling.gpu_budget, args.num_gpus_per_replica, scaling.priority))
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="flux_ray.router.autoscaling.policy:LedgerPolicy",
        policy_kwargs={"tier": args.tier, "rules": rules, "terms": terms},
    )
    # The policy knows when to wait: Serve is not to wait once more.
    config = AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=policy,
    )
    return {"autoscaling_config": config}


def granted_replica_first() -> RequestRouterConfig:
    """Of the tiers: a request goes to the replica that the ledger granted it."""
    # Ray's annotation says a dict.
    router_class: Any = AssignedReplicaRouter
    return RequestRouterConfig(request_router_class=router_class)


def text_encoder_for(args: TierArgs) -> Application:
    """One for all replicas of the tier, on a GPU of its own: it works for a moment a request."""
    deployment = serve.deployment(
        name=f"{args.tier}-text-encoder",
        num_replicas=1,
        max_ongoing_requests=256,
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": 1 if args.device == "cuda" else 0,
        },
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_timeout_s(args),
    )(TextEncoder)
    return deployment.bind(args)
