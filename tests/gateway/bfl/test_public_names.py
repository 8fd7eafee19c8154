"""Clients of BFL's API reach the tiers under the names that they know, if the operator says so."""

import httpx
import pytest
from fastapi import FastAPI

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.router import Router, Terms
from tests.conftest import LIMITS

TIERS = ("flux-1-dev", "flux-1-fill-dev", "flux-2-klein-4b")
GIVEN = {"tiers": TIERS, "limits": LIMITS, "public_url": "https://flux.example"}


@pytest.fixture(params=[True, False])
def is_named(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def gateway_args(job_args, is_named: bool) -> GatewayArgs:
    own = {"flux-pro": "flux-2-klein-4b"}
    return GatewayArgs.model_validate(
        GIVEN | {"jobs": job_args, "aliases": own, "bfl_names": is_named}
    )


@pytest.fixture
def api(handles, turns, bill, gateway_args, desk) -> FastAPI:
    prices = CostModel({tier: ReplicaSpec("h100-80gb") for tier in TIERS})
    router = Router(handles, turns, prices, bill, Terms(600, gateway_args.deadlines))
    return build_api(router, gateway_args, job_service=desk)


async def served_by(client: httpx.AsyncClient, path: str) -> str | int:
    """Return the tier that serves a job that is submitted there, or the status of the refusal."""
    answer = await client.post(path, json={"prompt": "a ring", "width": 1024, "height": 768})
    if answer.status_code != 200:
        return answer.status_code
    return answer.json()["details"]["served_model"]


async def test_a_public_name_is_a_route_to_the_tier_of_its_kind(client, is_named: bool):
    for path in ("/v1/flux-dev", "/v1/flux-pro-1.1", "/proxy/bfl/flux-pro-1.1-ultra/generate"):
        assert await served_by(client, path) == ("flux-1-dev" if is_named else 404)
    assert await served_by(client, "/v1/flux-kontext-pro") == 404, "nothing here is of its kind"
    assert await served_by(client, "/v1/flux-pro") == "flux-2-klein-4b", "the operator's own"
    models = {model["id"] for model in (await client.get("/v1/models")).json()["data"]}
    assert ("flux-pro-1.0-fill" in models) == is_named
