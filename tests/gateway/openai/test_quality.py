"""`quality`: steps where they make a difference, and said where they do not."""

import pytest

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.router import Router, Terms
from tests.conftest import LIMITS

PATH = "/v1/images/generations"
NO_EFFECT = ["quality has no effect on flux-2-dev"]


@pytest.fixture
def api(handles, turns, bill):
    tiers = ("flux-2-dev", "flux-2-klein-4b")
    prices = CostModel({tier: ReplicaSpec("h100-80gb") for tier in tiers})
    router = Router(handles, turns, prices, bill, Terms(request_timeout_s=5))
    return build_api(router, GatewayArgs(tiers=tiers, default_tier="flux-2-dev", limits=LIMITS))


@pytest.mark.parametrize(
    ("fields", "num_steps", "warnings"),
    [
        ({}, 50, []),
        ({"quality": "auto"}, 50, []),
        ({"quality": "low"}, 20, []),
        ({"quality": "medium"}, 28, []),
        ({"quality": "standard"}, 28, []),
        ({"quality": "high"}, 50, []),
        ({"quality": "hd"}, 50, []),
        ({"quality": "max"}, 50, []),
        ({"quality": "low", "steps": 33}, 33, NO_EFFECT),
        ({"quality": "auto", "steps": 33}, 33, []),
        ({"quality": "ultra"}, 50, NO_EFFECT),
        ({"quality": ""}, 50, []),
    ],
)
async def test_it_is_a_number_of_steps(client, handles, fields, num_steps, warnings):
    answer = await client.post(PATH, json={"prompt": "a ring"} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["warnings"] == warnings
    assert handles.requests[0].num_steps == num_steps


async def test_it_is_paid_for(client, turns):
    for quality in ("low", "high"):
        await client.post(PATH, json={"prompt": "a ring", "quality": quality})
    low, high = turns.submissions
    assert 2.2 < high.cost_s / low.cost_s < 2.6


async def test_a_distilled_tier_has_its_own(client, handles):
    body = {"prompt": "a ring", "quality": "low", "model": "flux-2-klein-4b"}
    answer = await client.post(PATH, json=body)
    assert answer.json()["warnings"] == ["quality has no effect on flux-2-klein-4b"]
    assert handles.requests[0].num_steps == 4


async def test_other_dialects_have_it_too(client, handles):
    body = {"inputs": "a ring", "parameters": {"quality": "medium"}}
    answer = await client.post("/models/flux-2-dev", json=body)
    assert answer.status_code == 200 and "x-flux-warnings" not in answer.headers
    assert handles.requests[0].num_steps == 28
