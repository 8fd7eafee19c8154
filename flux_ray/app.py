"""The deployment graph on one page: one Serve application per tier, and the gateway's in front.

A Serve config file (serve/*.yaml) names the builders `build_gateway` and `build_tier`, and gives
their args.
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

from flux_ray.config import (
    PROXY_CALLBACK,
    READ_WITH_H11,
    GatewayArgs,
    TierArgs,
    check_addresses,
    reads_with_h11,
)
from flux_ray.gateway.api import build_api
from flux_ray.gateway.bfl.routes import job_service_for
from flux_ray.gateway.memory_budget import MEMORY
from flux_ray.gateway.request_log import watch_requests
from flux_ray.private_files import make_folder
from flux_ray.replica.leader import Leader
from flux_ray.replica.rank_group import resources_for
from flux_ray.replica.text_encoder import TextEncoder
from flux_ray.router.autoscaling.gpu_budget import BudgetTerms
from flux_ray.router.background import keep_running
from flux_ray.router.dispatch import TierHandles, learn_layouts
from flux_ray.router.ledger.client import LedgerClient
from flux_ray.router.ledger.quota_client import PriceExchange, QuotaClient
from flux_ray.router.ledger.remote import RemoteLedger
from flux_ray.router.metrics import GatewayGauges, JobGauges, RouterMetrics
from flux_ray.router.pricing import CostModel, ReplicaSpec, check_possible, drain_timeout_s
from flux_ray.router.replica_choice import AssignedReplicaRouter
from flux_ray.router.router import Router, Terms
from flux_ray.router.trace import Recorder

logger = logging.getLogger("ray.serve")

# Serve replaces a leader that has ended at the next check. One that hangs fails three checks first;
# the ledger's process kills it before that (router/ledger/remote.py).
HEALTH_CHECK_PERIOD_S = 1
HEALTH_CHECK_TIMEOUT_S = 5


def warn_of_proxy() -> None:
    """Log a warning if this node's proxy was not told how to read HTTP."""
    if not reads_with_h11():
        logger.warning(
            "requests that offer HTTP/2, like a JDK's, lose their bodies: start Ray with %s=%s",
            PROXY_CALLBACK,
            READ_WITH_H11,
        )


@serve.ingress()
class Gateway:
    """The Serve deployment that speaks HTTP; it reaches the tiers by their handles."""

    def __init__(self, args: GatewayArgs) -> None:
        self._args = args

    async def __serve_build_asgi_app__(self) -> FastAPI:
        args = self._args
        watch_requests()
        warn_of_proxy()
        prices = CostModel({tier: ReplicaSpec(args.card) for tier in args.tiers})
        cold_starts: dict[str, float] = {}
        handles = TierHandles(args.tiers, learn_layouts(prices, args.card, cold_starts))
        ledger = RemoteLedger()
        name = uuid.uuid4().hex
        # This starts watching the tiers, so that even the first request is priced by their layouts.
        handles.reachable()
        metrics = RouterMetrics()
        ledger_client = LedgerClient(ledger, handles.reachable, name, cold_starts, metrics.hear)
        handles.follow_status(ledger_client.lose)
        # Before the first request: a gateway that cannot reach the ledger must not look ready.
        ledger_client.start()
        PriceExchange(ledger, prices).start()
        recorder = recorder_in(args.record_to, name)
        terms = Terms(args.request_timeout_s, args.deadlines)
        quotas = QuotaClient(ledger, name, metrics.limit)
        router = Router(
            handles,
            ledger_client,
            prices,
            metrics,
            terms,
            recorder,
            quotas,
            is_deployed=handles.is_deployed,
            hears_ledger=ledger.is_heard,
        )
        show_gauges(args, metrics, ledger, prices)
        job_service = job_service_for(router, args, show_census=JobGauges().show)
        return build_api(
            router, args, job_service=job_service, is_stopping=is_stopping, proxy_sends_id=True
        )

    async def check_health(self) -> None:
        """Show Serve and the ledger's process, which kills what hangs, that the event loop runs."""


def show_gauges(
    args: GatewayArgs, metrics: RouterMetrics, ledger: RemoteLedger, prices: CostModel
) -> None:
    """Start the task that shows what this gateway holds, hears and knows, every few seconds."""
    gauges = GatewayGauges(
        metrics,
        args.limits.max_kept_bytes,
        held_bytes=lambda: MEMORY.num_bytes,
        num_refused=lambda: MEMORY.num_refused,
        hears_ledger=ledger.is_heard,
        replica_gpus=lambda: {tier: prices.on_all_cards(tier, 1.0) for tier in args.tiers},
    )
    keep_running(gauges.run, "what shows gauges")


def recorder_in(folder: Path | None, name: str) -> Recorder | None:
    """Return what records arrivals into a folder, None without one.

    Gateways of one node may share the folder: each writes a file of its own.
    """
    if folder is None:
        return None
    make_folder(folder)
    return Recorder(folder / f"{name}.jsonl")


def is_stopping() -> bool:
    """Return whether Serve has begun to end this replica.

    Serve tells a replica only after its last request, so this reads a private attribute. If another
    version of Serve lacks it, the answer is False, and the end is noticed when it comes.
    """
    worker = global_worker
    replica = getattr(worker.actors.get(worker.actor_id), "_replica_impl", None)
    return bool(getattr(replica, "_shutting_down", False))


def build_gateway(args: GatewayArgs) -> Application:
    """Return the gateway's application; ValueError names a key that asks the impossible."""
    check_addresses(args)
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
    """Return the application of one tier, which has no route; it must be named like the tier."""
    return tier_application(args, Leader)


def tier_application(args: TierArgs, leader: type[Leader]) -> Application:
    """Return the application of a tier: its leaders, and a text encoder if they share one."""
    # Fill it in: gateways of older versions read the args of replicas, and expect a number here.
    args = args.model_copy(update={"drain_timeout_s": drain_timeout_s(args)})
    deployment = serve.deployment(
        name=args.tier,
        **replicas_of(args),
        max_ongoing_requests=args.max_ongoing_requests,
        **resources_for(args),
        request_router_config=granted_replica_first(),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_timeout_s(args),
    )(leader)
    if args.text_encoder == "colocated":
        return deployment.bind(args)
    return deployment.bind(args, text_encoder_for(args))


def replicas_of(args: TierArgs) -> dict[str, Any]:
    """Return Serve's options for the number of replicas: fixed, or by our scaling policy."""
    scaling = args.autoscaling
    if scaling is None:
        return {"num_replicas": args.num_replicas}
    rules = scaling.model_dump(include={"target_wait_s", "cold_start_s", "headroom", "idle_s"})
    terms = None
    # A tier on processors takes no GPUs, so it must have no part in the budget.
    if scaling.gpu_budget is not None and args.num_gpus_per_replica:
        terms = asdict(BudgetTerms(scaling.gpu_budget, args.num_gpus_per_replica, scaling.priority))
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="flux_ray.router.autoscaling.policy:LedgerPolicy",
        policy_kwargs={"tier": args.tier, "rules": rules, "terms": terms},
    )
    # The policy itself knows when to wait, so Serve must not add a delay.
    config = AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=policy,
    )
    return {"autoscaling_config": config}


def granted_replica_first() -> RequestRouterConfig:
    """Return the config by which Serve sends a request to the replica that the ledger assigned."""
    # Any: Ray's annotation allows only a dict, its code also a class.
    router_class: Any = AssignedReplicaRouter
    return RequestRouterConfig(request_router_class=router_class)


def text_encoder_for(args: TierArgs) -> Application:
    """Return the one text encoder that all replicas of the tier share, on a GPU of its own."""
    deployment = serve.deployment(
        name=f"{args.tier}-text-encoder",
        num_replicas=1,
        max_ongoing_requests=256,
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": 1 if args.device == "cuda" else 0,
            "label_selector": args.node_labels,
        },
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_timeout_s(args),
    )(TextEncoder)
    return deployment.bind(args)
