"""`/openapi.json` is true: whatever it allows, and what it does not, is answered as it says."""

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from flux_ray.config.gateway import GatewayArgs, JobArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.images.fetch import Fetcher
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.router import Router, Terms
from tests.conftest import LIMITS, FakeBill, FakeHandles, FakeTurns
from tests.gateway.fake_desk import FakeDesk

# Of each operation; those of four have something to vary.
NUM_CASES = 100
SLOW_SETUP = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


async def nobody(host: str, port: int) -> list[str]:
    """A network without names."""
    raise OSError


def build():
    """A gateway whose replicas are fakes."""
    prices = CostModel({"tiny": ReplicaSpec("cpu", dtype="float32")})
    router = Router(FakeHandles(), FakeTurns(), prices, FakeBill(), Terms(5))
    args = GatewayArgs(tiers=("tiny",), limits=LIMITS, public_url="http://gateway", jobs=JobArgs())
    # No offline name is to be looked up, and none of this machine's is to be reached.
    fetcher = Fetcher(args.fetch, resolve=nobody)
    return build_api(router, args, job_service=FakeDesk(), fetcher=fetcher)


schema = schemathesis.openapi.from_asgi("/openapi.json", build())


# Not checked is that all it allows is taken: sizes and steps are a tier's, which no schema knows.
@schema.parametrize()
@settings(max_examples=NUM_CASES, deadline=None, derandomize=True, suppress_health_check=SLOW_SETUP)
def test_answers_are_those_of_the_description(case):
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
