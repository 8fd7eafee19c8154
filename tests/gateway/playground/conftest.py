"""One browser and one gateway of fakes for each file of this folder."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.router import Router, Terms
from tests.conftest import LIMITS, FakeBill
from tests.gateway.playground.browser import (
    PaintingHandles,
    QueueingTurns,
    chromium,
    opened,
    page_of,
    served,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def painters() -> PaintingHandles:
    return PaintingHandles()


@pytest.fixture(scope="module")
def queue() -> QueueingTurns:
    return QueueingTurns()


@pytest.fixture(scope="module")
def painting_router(painters: PaintingHandles, queue: QueueingTurns) -> Router:
    tiers = ("tiny", "tiny-tp2", "flux-2-dev")
    prices = CostModel({tier: ReplicaSpec("cpu", dtype="float32") for tier in tiers})
    return Router(
        painters,
        queue,
        prices,
        FakeBill(),
        Terms(request_timeout_s=60),
        is_deployed=lambda tier: tier in painters.deployed,
    )


@pytest.fixture(scope="module")
def address(painting_router: Router) -> Iterator[str]:
    args = GatewayArgs(
        tiers=("tiny", "tiny-tp2", "flux-2-dev"),
        default_tier="tiny",
        aliases={"studio": {"tiers": ["tiny-tp2", "tiny"]}},
        limits=LIMITS,
    )
    with served(build_api(painting_router, args)) as address:
        yield address


@pytest.fixture(autouse=True)
def let_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a gate closed to the next one."""
    yield
    if "painters" in request.fixturenames:
        handles: PaintingHandles = request.getfixturevalue("painters")
        handles.may_finish.set()
        handles.requests.clear()
        handles.failures.clear()
    if "queue" in request.fixturenames:
        request.getfixturevalue("queue").may_start.set()


@pytest.fixture
def page(browser: Browser, address: str, painters: PaintingHandles) -> Iterator[Page]:
    """A page of a new visitor, opened."""
    with page_of(browser) as page:
        yield opened(page, address)
