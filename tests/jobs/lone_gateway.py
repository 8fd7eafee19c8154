"""A gateway with jobs in a process of its own: all of it is real, but for the cluster."""

import socket
import sys

import uvicorn

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.bfl.routes import job_service_for
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.router import Router, Terms
from tests.jobs.fake_cluster import FakeHandles, FakeTurns

NUM_SLOTS = 2


class NoBill:
    """Nobody counts."""

    def enter(self, tier: str, gpu_seconds: float) -> None:
        pass

    def compare(self, observations: object) -> None:
        pass

    def wait(self, tier: str, seconds: float) -> None:
        pass

    def spend(self, tier: str, gpu_seconds: float, key_class: str) -> None:
        pass

    def refuse(self, tier: str, reason: str) -> None:
        pass

    def retry(self, tier: str) -> None:
        pass

    def settle(self, tier: str, key_class: str, *, is_kept: bool) -> None:
        pass


def main(args: GatewayArgs, descriptor: int) -> None:
    prices = CostModel({tier: ReplicaSpec(args.card) for tier in args.tiers})
    terms = Terms(args.request_timeout_s)
    router = Router(FakeHandles(), FakeTurns(NUM_SLOTS), prices, NoBill(), terms)
    api = build_api(router, args, job_service=job_service_for(router, args))
    config = uvicorn.Config(api, log_level="error", http="h11")
    listener = socket.socket(fileno=descriptor)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(GatewayArgs.model_validate_json(sys.argv[1]), int(sys.argv[2]))
