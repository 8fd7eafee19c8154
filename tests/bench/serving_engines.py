"""The engines of the serving benches, and what they are served by.

They run in plain FastAPI, in plain Ray Serve, and as a tier of ours.
"""

import asyncio
import base64
from typing import Protocol

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from flux_ray.app import tier_application
from flux_ray.catalog.gpus import PROCESSOR
from flux_ray.catalog.tiers import tier_for
from flux_ray.config.tier import TierArgs
from flux_ray.replica.leader import Leader, RunningRequests, description_of
from flux_ray.request import EventStream, GeneratedImage, ImageRequest, ImageResult, StageTimes

FAKE_S = 0.05
NUM_FAKES = 4
TINY = tier_for("tiny")
PATH = "/v1/images/generations"
PROMPT = "a red circle on a blue background"


class Engine(Protocol):
    """An engine that generates one image at a time."""

    async def generate(self, prompt: str, seed: int) -> bytes:
        """Return the bytes of a PNG file."""


class FakeEngine:
    """An engine that takes time like a GPU but no CPU, so that only the serving is measured."""

    def __init__(self, num_slots: int = 1) -> None:
        self._slots = asyncio.Semaphore(num_slots)

    async def generate(self, prompt: str, seed: int) -> bytes:
        async with self._slots:
            await asyncio.sleep(FAKE_S)
        return b"image"


class TinyEngine:
    """An engine with the embedded model on one thread, as a rank of ours runs it."""

    def __init__(self) -> None:
        # Imported only where it is used: the deployment graph is built without torch.
        import torch

        from flux_ray.engine.api import Placement
        from flux_ray.engine.registry import load_adapter
        from flux_ray.replica.process import keep_memory

        keep_memory()
        torch.set_num_threads(1)
        self._adapter = load_adapter(TINY, None, Placement("float32", "cpu"))
        self._lock = asyncio.Lock()

    async def generate(self, prompt: str, seed: int) -> bytes:
        async with self._lock:
            return await asyncio.to_thread(self.generate_now, prompt, seed)

    def generate_now(self, prompt: str, seed: int) -> bytes:
        from flux_ray.engine.api import ImageSpec
        from flux_ray.engine.images import encode_image
        from flux_ray.request import Encoding

        adapter = self._adapter
        conditioning = adapter.encode(adapter.encode_prompt(prompt), ())
        state = adapter.prepare(conditioning, ImageSpec(128, 128, TINY.num_steps), seed)
        while not state.is_done:
            state = adapter.denoise(state)
        return encode_image(adapter.decode(state), Encoding())


class Fields(BaseModel):
    prompt: str
    seed: int = 0


def routes_around(engine: Engine) -> FastAPI:
    """Return a plain server around an engine: JSON in, JSON out, and nothing else."""
    api = FastAPI()

    @api.post(PATH)
    async def generate(fields: Fields) -> dict[str, str]:
        image = await engine.generate(fields.prompt, fields.seed)
        return {"b64_json": base64.b64encode(image).decode()}

    return api


def plain_serve(engine: type[FakeEngine] | type[TinyEngine], num_replicas: int) -> Application:
    """Build a deployment of Serve with the same routes and nothing else."""

    @serve.ingress()
    class Plain:
        async def __serve_build_asgi_app__(self) -> FastAPI:
            return routes_around(engine())

    options = {"num_cpus": 0.1}
    deployment = serve.deployment(
        name="plain", num_replicas=num_replicas, max_ongoing_requests=64, ray_actor_options=options
    )(Plain)
    return deployment.bind()


class FakeLeader(Leader):
    """A leader of ours with the fake engine in place of ranks."""

    async def __init__(self, args: TierArgs) -> None:
        self._description = description_of(args, PROCESSOR)
        self._engine = FakeEngine()
        self._runs = RunningRequests(args.retry_bytes, args.retry_s)

    async def _stream(self, request: ImageRequest) -> EventStream:
        data = await self._engine.generate(request.prompt, request.seed)
        times = StageTimes(0.0, FAKE_S / 10, FAKE_S * 0.8, FAKE_S / 10)
        yield ImageResult(
            request.request_id, request.tier, (GeneratedImage(data, request.seed),), times
        )

    async def check_health(self) -> None:
        pass


def fake_tier() -> Application:
    """Build our tier around the fake engine."""
    args = TierArgs(tier="tiny", device="cpu", num_replicas=NUM_FAKES, num_cpus=0.1)
    return tier_application(args, FakeLeader)
