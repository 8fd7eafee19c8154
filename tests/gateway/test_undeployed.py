"""A tier that is listed and not deployed: refused at once, passed over by aliases, and marked."""

import pytest

from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.jobs import JobGenerator
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.router import Router, Terms
from tests.conftest import LIMITS

TIERS = ("flux-2-klein-9b", "flux-2-klein-4b")
BEST, OTHER = TIERS
ALIASES = {
    "one": {"tiers": TIERS},
    "spilling": {"tiers": TIERS, "policy": "spill", "max_wait_s": 3},
    "cascading": {"tiers": TIERS, "policy": "cascade"},
    "bounded": {"tiers": TIERS, "max_gpu_seconds": 1000},
    "alone": BEST,
}


@pytest.fixture
def deployed() -> set[str]:
    """The tiers that are."""
    return {OTHER}


@pytest.fixture
def router(handles, turns, bill, deployed) -> Router:
    prices = CostModel({tier: ReplicaSpec("h100-80gb") for tier in TIERS})
    terms = Terms(request_timeout_s=60)
    return Router(handles, turns, prices, bill, terms, is_deployed=deployed.__contains__)


@pytest.fixture
def gateway_args(job_args) -> GatewayArgs:
    described = {"tiers": TIERS, "aliases": ALIASES, "limits": LIMITS, "jobs": job_args}
    return GatewayArgs.model_validate(described | {"public_url": "https://flux.example"})


@pytest.fixture
def generate_job(router, gateway_args):
    return JobGenerator(router, gateway_args).generate


@pytest.fixture
def api(router, gateway_args, desk):
    return build_api(router, gateway_args, job_service=desk)


GENERATIONS = "/v1/images/generations"


@pytest.mark.parametrize("name", [BEST, "alone"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATIONS, {"model": "{}", "prompt": "a ring"}),
        (GENERATIONS, {"model": "{}", "prompt": "a ring", "stream": True}),
        ("/models/{}", {"inputs": "a ring"}),
        ("/v1/{}", {"prompt": "a ring"}),
        ("/proxy/bfl/{}/generate", {"prompt": "a ring"}),
    ],
)
async def test_it_is_refused_at_once_in_every_dialect(client, turns, name, path, body):
    if "model" in body:
        body = body | {"model": name}
    answer = await client.post(path.format(name), json=body)
    assert answer.status_code == 503, answer.text
    assert f"{BEST} is not deployed" in answer.text
    assert "retry-after" in answer.headers
    if path == GENERATIONS:
        assert answer.json()["error"]["code"] == "tier_unavailable"
    assert turns.submissions == [], "nobody waited for it"
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


async def test_an_edit_is_refused_too(client, turns, make_image):
    form = {"model": BEST, "prompt": "a ring"}
    answer = await client.post("/v1/images/edits", data=form, files={"image": make_image()})
    assert (answer.status_code, turns.submissions) == (503, [])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("may_spill", ["true", "false"])
@pytest.mark.parametrize("name", ["auto", "one", "spilling", "cascading", "bounded"])
async def test_what_stands_for_several_takes_the_next_one(client, handles, name, stream, may_spill):
    answer = await client.post(
        GENERATIONS,
        json={"model": name, "prompt": "a ring", "stream": stream},
        headers={"x-flux-allow-spill": may_spill},
    )
    assert answer.status_code == 200, answer.text
    assert [each.tier for each in handles.requests] == [OTHER]
    assert '"error"' not in answer.text


@pytest.mark.parametrize("name", ["one", "spilling", "cascading", "bounded"])
async def test_a_job_is_that_of_the_next_one(client, desk, name):
    answer = await client.post(f"/v1/{name}", json={"prompt": "a ring"})
    assert answer.status_code == 200, answer.text
    assert (await desk.find("", answer.json()["id"])).tier == OTHER


async def test_a_mistake_of_the_caller_is_told_as_such(client):
    answer = await client.post(GENERATIONS, json={"model": BEST, "prompt": "a ring", "n": 1000})
    assert answer.status_code == 400


async def test_it_is_marked_among_the_models(client, deployed):
    async def marked() -> dict[str, bool]:
        models = (await client.get("/v1/models")).json()["data"]
        for model in models:
            assert (await client.get(f"/v1/models/{model['id']}")).json() == model
        return {each["id"]: each["deployed"] for each in models}

    marks = await marked()
    assert (marks[BEST], marks["alone"], marks[OTHER], marks["one"]) == (False, False, True, True)
    deployed.add(BEST)
    assert set((await marked()).values()) == {True}


async def test_it_is_served_as_soon_as_it_is_deployed(client, handles, deployed):
    body = {"model": BEST, "prompt": "a ring"}
    assert (await client.post(GENERATIONS, json=body)).status_code == 503
    deployed.add(BEST)
    assert (await client.post(GENERATIONS, json=body)).status_code == 200
    assert [each.tier for each in handles.requests] == [BEST]


async def test_a_gateway_that_cannot_reach_the_ledger_is_not_ready(client, router):
    assert (await client.get("/readyz")).status_code == 200
    router.hears_ledger = lambda: False
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "tier_unavailable")
    assert "ledger" in answer.json()["error"]["message"]
    assert (await client.get("/health")).status_code == 200
    router.hears_ledger = lambda: True
    assert (await client.get("/readyz")).status_code == 200
