"""Ray Serve for the reality bench: our gateway, and an ingress with other policies."""

import asyncio
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import Response

from flux_ray.app import build_gateway, tier_application
from flux_ray.catalog.gpus import PROCESSOR
from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import TierArgs
from flux_ray.replica.leader import Leader, description_of
from flux_ray.replica.rank_group import bundles_for, strategy_for
from flux_ray.request import EventStream, ImageRequest, ImageResult, Progress, StageTimes
from flux_ray.router import handover
from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.wire import pack_request
from tests.bench.reality_work import OURS, PROMPT, SERVE_DEFAULT, TIER, new_policy, ticket_of

PLAIN = "plain"
# Of an image of as many pixels as this.
PACED_STEP_S = 0.01
PACED_PIXELS = 128 * 128


class PacedLeader(Leader):
    """Passes time instead of computing: as many replicas as one likes on few processors."""

    async def __init__(self, args: TierArgs) -> None:  # type: ignore[misc]
        self._description = description_of(args, PROCESSOR)
        self._turn = asyncio.Lock()

    async def _stream(self, request: ImageRequest) -> EventStream:
        """No images, after the time of its steps; one request at a time."""
        num_pixels = request.width * request.height * request.num_images
        queued_at = time.perf_counter()
        async with self._turn:
            began = time.perf_counter()
            step_s = PACED_STEP_S * num_pixels / PACED_PIXELS / request.num_images
            for number in range(request.num_denoise_steps):
                await asyncio.sleep(began + (number + 1) * step_s - time.perf_counter())
                yield Progress(number + 1, request.num_denoise_steps)
            denoise_s = time.perf_counter() - began
            times = StageTimes(began - queued_at, 0.0, denoise_s, 0.0)
        yield ImageResult(request.request_id, request.tier, (), times)

    async def check_health(self) -> None:
        """It has no ranks to ask."""


class Ingress:
    """Speaks the least HTTP, and sends requests where one of the opponents would."""

    def __init__(self, policy: str, num_replicas: int) -> None:
        self._is_serves = policy == SERVE_DEFAULT
        self._queue = new_policy(policy)
        self._num_replicas = num_replicas
        app = PLAIN if self._is_serves else TIER
        self._handle = serve.get_app_handle(app).options(method_name="generate")
        self._granted: dict[str, asyncio.Future[str]] = {}
        self._is_connected = False

    async def __call__(self, http: Request) -> Response:
        """No images: the time is what counts."""
        fields = await http.json()
        side = int(fields["size"].split("x")[0])
        request = ImageRequest(
            os.urandom(8).hex(), TIER, PROMPT, side, side, fields["steps"], 1.0, 1, fields["n"]
        )
        if self._is_serves:
            await self._handle.remote(pack_request(request))
            return Response()
        await self._connect()
        ticket = ticket_of(request.request_id, time.monotonic())
        granted = TIER, request.request_id
        handover.GRANTED[granted] = await self._turn(ticket)
        try:
            await self._handle.remote(pack_request(request))
        finally:
            del handover.GRANTED[granted]
            self._queue.finish(request.request_id, time.monotonic())
            self._hand_over()
        return Response()

    async def _connect(self) -> None:
        names: tuple[str, ...] = ()
        while len(names) < self._num_replicas:
            # Serve tells of them on a thread of its own.
            await asyncio.sleep(0)
            names = handover.REACHABLE.get(TIER, ())
        if not self._is_connected:
            self._is_connected = True
            for name in names:
                self._queue.add_replica(name, time.monotonic())

    async def _turn(self, ticket: QueuedRequest) -> str:
        granted = asyncio.get_running_loop().create_future()
        self._granted[ticket.ticket_id] = granted
        self._queue.offer(ticket, time.monotonic())
        self._hand_over()
        return await granted

    def _hand_over(self) -> None:
        grants, _ = self._queue.take(time.monotonic())
        for grant in grants:
            self._granted.pop(grant.ticket.ticket_id).set_result(grant.replica)


@dataclass(frozen=True)
class Cluster:
    """A Serve with the tier on it, once behind our request router and once behind Serve's own."""

    address: str
    num_replicas: int

    def url(self, policy: str) -> str:
        """Where requests go to; opponents are deployed one at a time."""
        if policy == OURS:
            return f"{self.address}/v1/images/generations"
        ingress = serve.deployment(
            name="opponent", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
        )(Ingress)
        serve.run(
            ingress.bind(policy, self.num_replicas), name="opponent", route_prefix="/opponent"
        )
        return f"{self.address}/opponent"


def free_port() -> int:
    """Below those that the system hands out: Ray's own connections would take it meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


@contextmanager
def cluster(num_replicas: int, *, is_paced: bool, has_opponents: bool = True) -> Iterator[Cluster]:
    """While it lasts, Serve runs on a Ray of its own."""
    port = free_port()
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        num_cpus=2,
        object_store_memory=200_000_000,
        namespace="serve",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = TierArgs(
            tier=TIER,
            device="cpu",
            dtype="float32",
            num_replicas=num_replicas,
            num_cpus=0.9 / num_replicas,
            max_ongoing_requests=1000,
        )
        leader = PacedLeader if is_paced else Leader
        serve.run(tier_application(args, leader), name=TIER, route_prefix=None)
        if has_opponents:
            serve.run(by_serve(args, leader), name=PLAIN, route_prefix=None)
        serve.run(build_gateway(GatewayArgs(tiers=(TIER,), card="cpu")), name="gateway")
        yield Cluster(f"http://127.0.0.1:{port}", num_replicas)
    finally:
        serve.shutdown()
        ray.shutdown()


def by_serve(args: TierArgs, leader: type[Leader]) -> Application:
    """What users have: the same deployment, with Serve's own choice of a replica."""
    deployment = serve.deployment(
        name=PLAIN,
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=bundles_for(args),
        placement_group_strategy=strategy_for(args.parallel),
    )(leader)
    return deployment.bind(args)
