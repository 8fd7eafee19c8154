"""What several test folders share: a gateway of fakes, images to send, and the log."""

import io
import logging
from collections.abc import Callable, Iterator

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from PIL import Image

from flux_ray.config.gateway import GatewayArgs, Limits
from flux_ray.errors import NotKept
from flux_ray.gateway.api import build_api
from flux_ray.request import (
    GeneratedImage,
    ImageRequest,
    ImageResult,
    OnEvent,
    Preview,
    Progress,
    RequestEvent,
    StageTimes,
)
from flux_ray.router.ledger.messages import Place, Retry, SubmitRequest
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel, Observation
from flux_ray.router.queue.admission import Forecast
from flux_ray.router.router import Router, Terms
from tests.ranks import Ranks

# A property test fails because of an example, never because the machine is slow at making one.
SLOW_MACHINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("change", max_examples=100, print_blob=True, **SLOW_MACHINE)
settings.register_profile("thorough", settings.get_profile("change"), max_examples=2_000)
settings.load_profile("change")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Spread files over the processes of `-n 2`; all tests that use `run_ranks` share one."""
    if config.getoption("dist", "no") == "loadgroup":
        for item in items:
            has_ranks = "run_ranks" in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group("ranks" if has_ranks else str(item.path)))


LIMITS = Limits(
    max_body_bytes=1_000_000,
    max_image_bytes=200_000,
    max_image_pixels=500_000,
    max_prompt_chars=1000,
    max_images=4,
)


def news_of(request: ImageRequest) -> list[RequestEvent]:
    """Return the events that a replica sends of one image; its previews are `preview <number>`."""
    previews = [
        Preview(request.tier, GeneratedImage(b"preview %d" % number, request.seed), number)
        for number in range(len(request.preview_steps))
    ]
    return [*previews, Progress(request.num_steps, request.num_steps)]


class FakeHandles:
    """A fake of the router's replicas that answers at once with `image <seed>`.

    It first raises the errors in `failures`, one for each call.
    """

    def __init__(self) -> None:
        self.requests: list[ImageRequest] = []
        self.replicas: list[str] = []
        self.failures: list[Exception] = []
        self.ready: tuple[str, ...] = ("tiny",)
        # Results by replica and name of the run.
        self.generated: dict[tuple[str, str], ImageResult] = {}

    async def connect(self, tier: str) -> None:
        pass

    async def generate(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None = None, run: str = ""
    ) -> ImageResult:
        self.requests.append(request)
        self.replicas.append(replica)
        for news in news_of(request) if on_event is not None else ():
            on_event(news)
        if self.failures:
            raise self.failures.pop(0)
        self.generated[replica, run] = ImageResult(
            request_id=request.request_id,
            tier=request.tier,
            images=tuple(GeneratedImage(b"image %d" % seed, seed) for seed in request.seeds),
            times=StageTimes(queue_s=0.001, encode_s=0.002, denoise_s=0.003, decode_s=0.004),
        )
        return self.generated[replica, run]

    async def recall(
        self, request: ImageRequest, replica: str, on_event: OnEvent | None, run: str
    ) -> ImageResult:
        if (replica, run) not in self.generated:
            raise NotKept("it was drawn elsewhere")
        return self.generated[replica, run]

    async def ready_tiers(self) -> tuple[str, ...]:
        return self.ready


class FakeTurns:
    """A fake of the ledger that assigns every request a replica at once.

    It first raises the errors in `refusals`, one for each request. A tier that is not in
    `forecasts` has no wait.
    """

    def __init__(self) -> None:
        self.submissions: list[SubmitRequest] = []
        self.ended: list[str] = []
        self.done: list[str] = []
        self.left_s: dict[str, list[float]] = {}
        self.refusals: list[Exception] = []
        self.forecasts: dict[str, Forecast] = {}

    async def take(
        self, offer: SubmitRequest, on_event: OnEvent | None = None, quota: object = None
    ) -> str:
        self.submissions.append(offer)
        if self.refusals:
            raise self.refusals.pop(0)
        return f"replica {len(self.submissions)}"

    async def forecast(self, offers: tuple[SubmitRequest, ...]) -> tuple[Forecast, ...]:
        return tuple(self.forecasts.get(offer.tier, Forecast(0.0)) for offer in offers)

    async def places(self, retry: Retry) -> tuple[Place, ...]:
        return tuple(
            Place(
                offer.ticket_id,
                offer.tier,
                f"replica {number}",
                each.fingerprint,
                offer.seed,
                each.prompt,
            )
            for number, offer in enumerate(self.submissions, 1)
            if (each := offer.retry) is not None and each.name == retry.name
            if each.is_lasting or offer.ticket_id not in self.done
        )

    def progress(self, ticket_id: str, left_s: float) -> None:
        self.left_s.setdefault(ticket_id, []).append(left_s)

    def end(self, ticket_id: str, *, is_done: bool = False) -> None:
        self.ended.append(ticket_id)
        if is_done:
            self.done.append(ticket_id)


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Ranks]:
    """Return `run_ranks(parallel, function, *args)`: what `function(mesh, *args)` returns by rank.

    The ranks are processes, which the tests of a session share.
    """
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def handles() -> Iterator[FakeHandles]:
    handles = FakeHandles()
    yield handles
    # pytest may keep the fixture for longer, and the images of its requests would still count in
    # the gateway's memory budget, in later tests.
    handles.requests.clear()


@pytest.fixture
def turns() -> FakeTurns:
    return FakeTurns()


class FakeBill:
    """A fake of the router's metrics that keeps what is counted, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, object]] = []
        self.spent: list[tuple[str, float]] = []
        self.refusals: list[tuple[str, str]] = []
        self.retries: list[str] = []
        self.promises: list[tuple[str, str, bool]] = []
        self.upsampled: list[tuple[str, str, str]] = []

    def wait(self, tier: str, seconds: float) -> None:
        self.spent.append(("waited", seconds))

    def spend(self, tier: str, gpu_seconds: float, key_class: str) -> None:
        self.spent.append(("drawn", gpu_seconds))

    def enter(self, tier: str, gpu_seconds: float) -> None:
        self.entries.append(("priced", gpu_seconds))

    def compare(self, observations: tuple[Observation, ...]) -> None:
        self.entries += [("measured", seen.measured_s) for seen in observations]

    def refuse(self, tier: str, reason: str) -> None:
        self.entries.append(("refused", tier))
        self.refusals.append((tier, reason))

    def retry(self, tier: str) -> None:
        self.retries.append(tier)

    def upsample(self, tier: str, key_class: str, outcome: str, seconds: float) -> None:
        self.upsampled.append((tier, key_class, outcome))

    def settle(self, tier: str, key_class: str, *, is_kept: bool) -> None:
        self.promises.append((tier, key_class, is_kept))


@pytest.fixture
def bill() -> FakeBill:
    return FakeBill()


@pytest.fixture
def router(handles: FakeHandles, turns: FakeTurns, bill: FakeBill) -> Router:
    prices = CostModel({"tiny": ReplicaSpec("cpu", dtype="float32")})
    return Router(handles, turns, prices, bill, Terms(request_timeout_s=5))


@pytest.fixture
def gateway_args() -> GatewayArgs:
    return GatewayArgs(tiers=("tiny",), limits=LIMITS)


@pytest.fixture
def api(router: Router, gateway_args: GatewayArgs) -> FastAPI:
    return build_api(router, gateway_args)


@pytest.fixture
def make_image() -> Callable[..., bytes]:
    """Return `make_image(100, 80, format="PNG", mode="RGB", color="red")`: the bytes of a file."""

    def draw(width=96, height=80, *, format="PNG", mode="RGB", color="red", **options) -> bytes:
        file = io.BytesIO()
        Image.new(mode, (width, height), color).save(file, format, **options)
        return file.getvalue()

    return draw


@pytest.fixture
def serve_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Capture what reaches Serve's log files; Ray cuts this logger off from the root logger."""
    logger = logging.getLogger("ray.serve")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagate
