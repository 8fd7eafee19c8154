"""The Ray Serve of the reality bench: our gateway, and an ingress with the opponents' policies."""

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
from flux_ray.replica.rank_group import resources_for
from flux_ray.request import EventStream, ImageRequest, ImageResult, Progress, StageTimes
from flux_ray.router import handover
from flux_ray.router.queue.entry import QueuedRequest
from flux_ray.wire import pack_request
from tests.bench.reality_work import OURS, PROMPT, SERVE_DEFAULT, TIER, new_policy, ticket_of

PLAIN = "plain"
# The seconds of a step for an image of PACED_PIXELS.
PACED_STEP_S = 0.01
PACED_PIXELS = 128 * 128


class PacedLeader(Leader):
    """A leader that sleeps instead of computing, so that many replicas fit on few CPUs."""

    async def __init__(self, args: TierArgs) -> None:  # type: ignore[misc]
        self._description = description_of(args, PROCESSOR)
        self._turn = asyncio.Lock()

    async def _stream(self, request: ImageRequest) -> EventStream:
        """Sleep for the time of the request's steps, then yield a result without images.

        Requests run one at a time.
        """
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
        """Return at once: there are no ranks to ask."""


class Ingress:
    """A minimal HTTP server that sends requests to the replicas that an opponent's policy picks."""

    def __init__(self, policy: str, num_replicas: int) -> None:
        self._is_serves = policy == SERVE_DEFAULT
        self._queue = new_policy(policy)
        self._num_replicas = num_replicas
        app = PLAIN if self._is_serves else TIER
        self._handle = serve.get_app_handle(app).options(method_name="generate")
        self._granted: dict[str, asyncio.Future[str]] = {}
        self._is_connected = False

    async def __call__(self, http: Request) -> Response:
        """Have the request generated, and answer without images: only the time counts."""
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
            # Serve reports the replicas on another thread.
            await asyncio.sleep(0)
            names = handover.REACHABLE.get(TIER, ())
        if not self._is_connected:
            self._is_connected = True
            for name in names:
                self._queue.add_replica(name, time.monotonic())

    async def _turn(self, ticket: QueuedRequest) -> str:
        granted = asyncio.get_running_loop().create_future()
        self._granted[ticket.ticket_id] = granted
        self._queue.submit(ticket, time.monotonic())
        self._hand_over()
        return await granted

    def _hand_over(self) -> None:
        grants, _ = self._queue.take(time.monotonic())
        for grant in grants:
            self._granted.pop(grant.request.ticket_id).set_result(grant.replica)


@dataclass(frozen=True)
class Cluster:
    """A Serve with two deployments of the tier, one for our request router and one for Serve's."""

    address: str
    num_replicas: int

    def url(self, policy: str) -> str:
        """Return the URL of a policy; an opponent is deployed in place of the one before."""
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
    """Return a free port below those that the system hands out: Ray's connections take those."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


@contextmanager
def cluster(num_replicas: int, *, is_paced: bool, has_opponents: bool = True) -> Iterator[Cluster]:
    """Run Serve on a Ray of its own during the `with`."""
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
    """Build the same deployment as users would without us: Serve chooses the replica."""
    deployment = serve.deployment(
        name=PLAIN,
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        **resources_for(args),
    )(leader)
    return deployment.bind(args)
