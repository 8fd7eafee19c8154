"""Models that stand for several tiers: who serves a request, and who may ask whom."""

import json
from base64 import b64decode
from datetime import UTC, datetime

import httpx
import pytest

from flux_ray.auth.keys import KeyFile, new_key, write_keys
from flux_ray.config.gateway import GatewayArgs
from flux_ray.errors import Overloaded, ReplicaFailed, TierUnavailable
from flux_ray.gateway.api import build_api
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.queue.admission import Forecast
from flux_ray.router.router import Router, Terms

PATH = "/v1/images/generations"
DEV, KLEIN_9B, KLEIN_4B = "flux-2-dev", "flux-2-klein-9b", "flux-2-klein-4b"
TIERS = [KLEIN_4B, KLEIN_9B, DEV]
ARGS = {
    "tiers": TIERS,
    "default_tier": KLEIN_4B,
    "deadlines": {DEV: 30.0},
    "aliases": {
        "gpt-image-1": KLEIN_4B,
        "klein": {"tiers": [KLEIN_9B, KLEIN_4B], "policy": "spill", "max_wait_s": 3},
        "thrifty": {"tiers": [DEV, KLEIN_4B], "max_gpu_seconds": 3},
        "studio": {"tiers": [DEV, KLEIN_4B], "policy": "cascade"},
    },
    "key_classes": {
        "paying": {
            "weight": 4,
            "deadline_s": 20,
            "licenses": ["apache-2.0"],
        },
        "some": {"tiers": [KLEIN_9B, KLEIN_4B]},
    },
}
NOW = datetime(2026, 11, 1, tzinfo=UTC)
BUSY = Forecast(100.0, is_refused=True)


@pytest.fixture
def secrets(tmp_path):
    """Of a key of each class, and of one that is of none."""
    made = {name: new_key(f"{name}-1", name, NOW) for name in ("paying", "some", None)}
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=tuple(each.key for each in made.values())))
    return {name: {"authorization": f"Bearer {each.secret}"} for name, each in made.items()}


@pytest.fixture
async def client(handles, turns, bill, secrets, tmp_path):
    prices = CostModel({tier: ReplicaSpec("h100-80gb") for tier in TIERS})
    args = GatewayArgs.model_validate(ARGS | {"keys_file": tmp_path / "keys.yaml"})
    router = Router(handles, turns, prices, bill, Terms(600, args.deadlines))
    transport = httpx.ASGITransport(app=build_api(router, args), raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://gateway", headers=secrets[None]
    ) as client:
        yield client


@pytest.fixture
def ask(client):
    async def ask(model, headers=None, **fields):
        body = {"prompt": "a ring", "model": model, **fields}
        return await client.post(PATH, json=body, headers=headers or {})

    return ask


def served_by(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-flux-model"] == answer.json()["model"]
    return answer.json()["model"]


async def test_an_explicit_tier_is_obeyed_whatever_it_waits(ask, turns):
    turns.forecasts = {DEV: BUSY}
    assert served_by(await ask(DEV)) == DEV
    turns.refusals = [Overloaded("too late", None, 7)]
    assert (await ask(DEV)).status_code == 429


async def test_auto_is_the_best_that_is_in_time(ask, turns, handles):
    assert served_by(await ask("auto")) == DEV
    turns.forecasts = {DEV: BUSY}
    assert served_by(await ask("auto")) == KLEIN_9B
    assert handles.requests[-1].num_steps == 4, "the defaults are those of the tier that draws"
    assert served_by(await ask("auto", headers={"x-flux-deadline-s": "0.9"})) == KLEIN_9B
    turns.forecasts = {}
    assert served_by(await ask("auto", headers={"x-flux-deadline-s": "0.9"})) == KLEIN_9B


async def test_what_a_tier_cannot_do_never_reaches_it(ask, client, turns, make_image):
    """Nine images are too many for all, five for klein, and 4-step tiers take no guidance."""
    file = ("a.png", make_image(64, 64), "image/png")
    form = {"prompt": "a ring", "model": "auto", "size": "64x64"}
    edits = "/v1/images/edits"
    turns.forecasts = {DEV: BUSY}
    five = await client.post(edits, data=form, files=[("image[]", file)] * 5)
    assert served_by(five) == DEV, "klein takes four"
    nine = await client.post(edits, data=form, files=[("image[]", file)] * 9)
    assert nine.status_code == 400
    assert nine.json()["error"]["message"] == "auto takes at most 6 images"


async def test_what_no_tier_can_do_is_told_as_the_best_would(ask, turns):
    answer = await ask("auto", size="100x100")
    assert answer.json()["error"]["param"] == "size"
    assert turns.submissions == []


async def test_a_model_with_a_price_is_the_best_within_it(ask, handles):
    assert served_by(await ask("thrifty")) == KLEIN_4B
    assert served_by(await ask("thrifty", size="256x256", steps=10)) == DEV
    answer = await ask("thrifty", n=10, steps=50)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


async def test_klein_spills_where_the_caller_allows_it(ask, turns):
    turns.forecasts = {KLEIN_9B: Forecast(3.5)}
    allowed = {"x-flux-allow-spill": "true"}
    assert served_by(await ask("klein", headers=allowed)) == KLEIN_4B
    assert served_by(await ask("klein")) == KLEIN_9B
    turns.forecasts = {KLEIN_9B: Forecast(2.5)}
    assert served_by(await ask("klein", headers=allowed)) == KLEIN_9B
    answer = await ask("klein", headers={"x-flux-allow-spill": "maybe"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-flux-allow-spill")


async def test_where_a_tier_refuses_after_all_the_next_is_tried(ask, turns, handles):
    turns.refusals = [Overloaded("too late", None, 7)]
    assert served_by(await ask("auto")) == KLEIN_9B
    turns.refusals = [
        Overloaded("too late", None, 70),
        TierUnavailable("down"),
        Overloaded("too late", None, 7),
    ]
    answer = await ask("auto")
    assert answer.status_code == 503, "of all refusals the one that is over first"
    assert answer.headers["retry-after"] == "5"


async def test_all_tiers_generate_the_same_request(ask, turns, handles):
    turns.refusals = [Overloaded("too late", None, 7)]
    answer = await ask("auto")
    offers = [offer.ticket_id for offer in turns.submissions]
    assert offers == [f"{tier}-{answer.json()['id']}-1" for tier in (DEV, KLEIN_9B)]
    assert handles.requests[0].request_id == answer.json()["id"]


async def test_deadlines_are_the_callers_the_classes_or_the_tiers(ask, turns, secrets):
    paying = secrets["paying"]
    await ask(KLEIN_4B, headers=paying | {"x-flux-deadline-s": "2.5"})
    await ask(KLEIN_4B, headers=paying)
    await ask(DEV)
    await ask(KLEIN_4B)
    assert [offer.deadline_in_s for offer in turns.submissions] == [2.5, 20, 30, 600]
    assert [offer.weight for offer in turns.submissions] == [4, 4, 1, 1]


async def test_a_key_uses_the_tiers_of_its_licences(ask, secrets):
    paying = secrets["paying"]
    assert served_by(await ask("auto", headers=paying)) == KLEIN_4B
    answer = await ask(DEV, headers=paying)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "license_forbids")
    assert served_by(await ask(DEV)) == DEV


async def test_a_key_uses_the_tiers_of_its_class(ask, secrets):
    some = secrets["some"]
    assert served_by(await ask("auto", headers=some)) == KLEIN_9B
    assert served_by(await ask("studio", headers=some)) == KLEIN_4B
    answer = await ask(DEV, headers=some)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "tier_forbidden")


async def test_aliases_are_listed_with_their_tiers(client):
    models = {model["id"]: model for model in (await client.get("/v1/models")).json()["data"]}
    assert list(models) == [*TIERS, "gpt-image-1", "klein", "thrifty", "studio"]
    assert models["klein"]["tiers"] == [KLEIN_9B, KLEIN_4B]
    assert models[DEV]["tiers"] == [DEV]
    assert (await client.get("/v1/models/auto")).json()["tiers"] == [DEV, KLEIN_9B, KLEIN_4B]
    assert (await client.get("/v1/models/dall-e-3")).status_code == 404


def events_of(text: str) -> list[tuple[str, dict]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name[7:], json.loads(data[6:])) for name, data in blocks]


async def test_a_cascade_streams_a_preview_and_then_the_image(ask, handles, turns):
    """The fakes answer at once: which of the two is first is not sure, the final is last."""
    answer = await ask("studio", stream=True, seed=5)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    name, final = events[-1]
    assert (name, final["type"], final["model"]) == (
        "image_generation.completed",
        "image_generation.completed",
        DEV,
    )
    assert final["usage"]["total_tokens"] > 0
    assert "partial_image_index" not in final
    assert {request.tier for request in handles.requests} == {DEV, KLEIN_4B}
    assert {(request.request_id, request.seed) for request in handles.requests} == {
        (final["id"], 5)
    }
    assert served_by(await ask("studio")) == DEV, "without a stream there is no preview"


async def test_any_model_streams_its_images(ask):
    events = events_of((await ask(DEV, stream=True, n=2)).text)
    assert [name for name, _ in events] == ["image_generation.completed"] * 2
    assert events[0][1]["seed"] + 1 == events[1][1]["seed"]


async def test_images_are_previewed_while_they_are_generated(ask, handles):
    """Each preview once, though a second replica makes them all again."""
    handles.failures = [ReplicaFailed("died")]
    answer = await ask(DEV, stream=True, partial_images=2, seed=5)
    events = events_of(answer.text)
    assert [name for name, _ in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    early = [event for _, event in events[:2]]
    assert [event["partial_image_index"] for event in early] == [0, 1]
    assert [b64decode(event["b64_json"]) for event in early] == [b"preview 0", b"preview 1"]
    final = events[-1][1]
    assert b64decode(final["b64_json"]) == b"image 5"
    assert {(event["id"], event["model"], event["seed"]) for event in early} == {
        (final["id"], DEV, 5)
    }
    assert "usage" in final and "usage" not in early[0]
    assert [request.num_previews for request in handles.requests] == [2, 2]


async def test_an_error_after_a_preview_is_an_event(ask, handles):
    handles.failures = [ReplicaFailed("died"), ReplicaFailed("died again")]
    names = [name for name, _ in events_of((await ask(DEV, stream=True, partial_images=1)).text)]
    assert names == ["image_generation.partial_image", "error"]


async def test_a_cascades_preview_is_that_of_the_other_tier(ask, handles):
    await ask("studio", stream=True, partial_images=2)
    assert [request.num_previews for request in handles.requests] == [0, 0]


async def test_errors_before_the_first_event_are_plain_answers(ask, turns):
    turns.refusals = [Overloaded("too late", None, 7)]
    answer = await ask(DEV, stream=True)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
