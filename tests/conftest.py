"""What several test folders share: a gateway whose replicas are fakes, and pictures to send."""

import io
from collections.abc import Callable, Iterator

import pytest
from fastapi import FastAPI
from PIL import Image

from flux_ray.config import GatewayArgs, Limits
from flux_ray.gateway.api import build_api
from flux_ray.request import GeneratedImage, ImageRequest, ImageResult, StageTimes
from flux_ray.router.router import Router
from tests.ranks import Ranks

LIMITS = Limits(
    max_body_bytes=1_000_000,
    max_image_bytes=200_000,
    max_image_pixels=500_000,
    max_prompt_chars=1000,
    max_images=4,
)


class FakeHandles:
    """Replicas that answer at once with `picture <seed>`, after raising what is in `failures`."""

    def __init__(self) -> None:
        self.requests: list[ImageRequest] = []
        self.failures: list[Exception] = []
        self.ready: tuple[str, ...] = ("tiny",)

    async def generate(self, request: ImageRequest) -> ImageResult:
        self.requests.append(request)
        if self.failures:
            raise self.failures.pop(0)
        return ImageResult(
            request_id=request.request_id,
            tier=request.tier,
            images=tuple(GeneratedImage(b"picture %d" % seed, seed) for seed in request.seeds),
            times=StageTimes(queue_s=0.001, encode_s=0.002, denoise_s=0.003, decode_s=0.004),
        )

    async def ready_tiers(self) -> tuple[str, ...]:
        return self.ready


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Ranks]:
    """`run_ranks(parallel, function, *args)`: the answers of `function(mesh, *args)` by rank."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def handles() -> FakeHandles:
    return FakeHandles()


@pytest.fixture
def gateway_args() -> GatewayArgs:
    return GatewayArgs(tiers=("tiny",), limits=LIMITS)


@pytest.fixture
def api(handles: FakeHandles, gateway_args: GatewayArgs) -> FastAPI:
    return build_api(Router(handles, request_timeout_s=5), gateway_args)


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """`picture(100, 80, format="PNG", mode="RGB", color="red")` as a file's bytes."""

    def draw(width=96, height=80, *, format="PNG", mode="RGB", color="red", **options) -> bytes:
        file = io.BytesIO()
        Image.new(mode, (width, height), color).save(file, format, **options)
        return file.getvalue()

    return draw
