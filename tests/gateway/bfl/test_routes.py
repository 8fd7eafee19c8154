"""BFL's routes, over a real desk: submitted, asked for, answered as its own API would."""

import asyncio
import base64
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from flux_ray.catalog import tiers
from flux_ray.catalog.tiers import TINY
from flux_ray.config.gateway import GatewayArgs
from flux_ray.errors import Overloaded, ReplicaFailed
from flux_ray.gateway.api import build_api
from flux_ray.gateway.jobs import JobGenerator
from tests.conftest import LIMITS

PUBLIC = "https://flux.example/api"


@pytest.fixture
def gateway_args(job_args) -> GatewayArgs:
    return GatewayArgs(
        tiers=("tiny",),
        aliases={"flux-dev": "tiny", "flux-kontext-pro": "tiny"},
        limits=LIMITS,
        public_url=PUBLIC,
        jobs=job_args,
    )


@pytest.fixture
def generate_job(router, gateway_args):
    return JobGenerator(router, gateway_args).generate


@pytest.fixture
def api(router, gateway_args, desk) -> FastAPI:
    return build_api(router, gateway_args, job_service=desk)


async def poll(client: httpx.AsyncClient, job_id: str, key: str = "k") -> dict[str, Any]:
    """Until it is no longer pending."""
    for _ in range(500):
        answer = await client.get("/v1/get_result", params={"id": job_id}, headers={"x-key": key})
        assert answer.status_code == 200, answer.text
        if answer.json()["status"] != "Pending":
            return answer.json()
        await asyncio.sleep(0.01)
    raise AssertionError("still pending")


async def submit(client: httpx.AsyncClient, name: str = "tiny", key: str = "k", **fields: Any):
    return await client.post(
        f"/v1/{name}", json={"prompt": "a red circle"} | fields, headers={"x-key": key}
    )


async def test_a_job_is_accepted_generated_and_fetched(client, handles):
    answer = await submit(client, seed=5, width=96, height=64)
    assert answer.status_code == 200
    told = answer.json()
    assert told["polling_url"] == f"{PUBLIC}/v1/get_result?id={told['id']}"
    assert told["status"] == "Pending"
    assert told["cost"] > 0
    assert (told["input_mp"], told["output_mp"]) == (0.0, 0.01)
    assert told["details"] == {"served_model": "tiny", "warnings": []}

    result = await poll(client, told["id"])
    assert result["status"] == "Ready"
    assert result["progress"] == 1.0
    sample = result["result"]
    assert (sample["prompt"], sample["seed"]) == ("a red circle", 5)
    assert sample["duration"] == pytest.approx(sample["end_time"] - sample["start_time"])
    [request] = handles.requests
    assert (request.width, request.height, request.seed) == (96, 64, 5)
    assert request.encoding.format == "jpeg"

    url = httpx.URL(sample["sample"])
    assert str(url).startswith(f"{PUBLIC}/results/{told['id']}/")
    fetched = await client.get(url.raw_path.decode().removeprefix("/api"))
    assert (fetched.status_code, fetched.content) == (200, b"image 5")
    assert fetched.headers["content-type"] == "image/jpeg"


async def test_other_peoples_jobs_are_not_there(client):
    told = (await submit(client, key="anna")).json()
    for job_id in (told["id"], "00000000-0000-0000-0000-000000000000", "../etc", ""):
        for method, path in (("GET", "/v1/get_result"), ("POST", "/v1/cancel")):
            answer = await client.request(
                method, path, params={"id": job_id}, headers={"x-key": "ben"}
            )
            assert answer.status_code == 404
            assert answer.json() == {
                "id": job_id,
                "status": "Task not found",
                "result": None,
                "progress": None,
                "details": None,
                "preview": None,
            }
    assert (await poll(client, told["id"], "anna"))["status"] == "Ready"


async def test_comfys_nodes_hand_in_at_a_path_of_their_own(client, handles):
    sent = {
        "prompt": "a red circle",
        "prompt_upsampling": False,
        # Half of what they draw is above 2**63.
        "seed": 2**64 - 1,
        "width": 64,
        "height": 96,
        "safety_tolerance": 6,
        "output_format": "png",
        "image_prompt": None,
    }
    answer = await client.post(
        "/proxy/bfl/flux-dev/generate", json=sent, headers={"X-API-KEY": "comfy"}
    )
    assert answer.status_code == 200, answer.text
    told = answer.json()
    # The nodes send their key to URLs that are relative to their base, and to no others.
    assert told["polling_url"] == f"/v1/get_result?id={told['id']}"
    answer = await client.get(told["polling_url"], headers={"X-API-KEY": "comfy"})
    assert answer.status_code == 200, answer.text
    result = await poll(client, told["id"], "comfy")
    assert (result["status"], result["result"]["seed"]) == ("Ready", 2**64 - 1)
    [request] = handles.requests
    assert (request.seed, request.width, request.height) == (2**64 - 1, 64, 96)


@pytest.mark.parametrize("path", ["/v1/flux-none", "/proxy/bfl/flux-none/generate"])
async def test_a_model_that_is_not_served(client, path):
    answer = await client.post(path, json={"prompt": "a ring"})
    message = "no model 'flux-none' is served here; there are: tiny, flux-dev, flux-kontext-pro"
    assert (answer.status_code, answer.json()["message"]) == (404, message)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/v1/chat/completions"])
async def test_openais_other_routes_are_missed_in_its_words(client, path):
    answer = await client.post(path, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("words", [{}, {"prompt": ""}, {"prompt": None}])
async def test_what_is_filled_needs_no_words(client, handles, make_image, words):
    clear = base64.b64encode(make_image(96, 80, mode="RGBA", color=(255, 0, 0, 0))).decode()
    sent = {"image": clear} | words
    answer = await client.post("/v1/flux-dev", json=sent, headers={"x-key": "k"})
    assert answer.status_code == 200, answer.text
    result = await poll(client, answer.json()["id"])
    assert (result["status"], result["result"]["prompt"]) == ("Ready", "")


async def test_references_come_in_their_order(client, handles, make_image):
    red, blue = (base64.b64encode(make_image(64, 80, color=c)).decode() for c in ("red", "blue"))
    answer = await submit(
        client, "flux-kontext-pro", input_image_2=f"data:image/png;base64,{blue}", input_image=red
    )
    assert answer.json()["input_mp"] == 0.01
    await poll(client, answer.json()["id"])
    [request] = handles.requests
    assert [raster.rgb[:3] for raster in request.references] == [b"\xff\0\0", b"\0\0\xff"]
    assert (request.width, request.height) == (64, 80), "the first one's"
    assert request.encoding.format == "png"


@pytest.mark.parametrize("name", ["input_images", "image_urls"])
async def test_a_list_of_references_is_edited(client, handles, make_image, name):
    red, blue = (base64.b64encode(make_image(64, 80, color=c)).decode() for c in ("red", "blue"))
    sent = {name: [red, {"image_url": {"url": f"data:image/png;base64,{blue}"}}]}
    answer = await submit(client, "flux-kontext-pro", **sent)
    assert answer.status_code == 200, answer.text
    assert answer.json()["details"]["warnings"] == []
    await poll(client, answer.json()["id"])
    [request] = handles.requests
    assert [raster.rgb[:3] for raster in request.references] == [b"\xff\0\0", b"\0\0\xff"]


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (128, 128)),
        ({"width": 0, "height": 0}, (128, 128)),
        ({"width": None, "height": 100}, (100, 100)),
        ({"width": 1024}, (1024, 1024)),
        ({"width": 96, "aspect_ratio": "16:9"}, (96, 58)),
        ({"width": 1024, "height": 768}, (1024, 768)),
        ({"aspect_ratio": "16:9"}, (160, 96)),
        ({"aspect_ratio": "16:9", "width": 64, "height": 96}, (64, 96)),
        ({"aspect_ratio": "auto"}, (128, 128)),
        ({"aspect_ratio": "", "mask": "", "webhook_url": ""}, (128, 128)),
        ({"aspect_ratio": "a client's own", "width": 64, "height": 96}, (64, 96)),
    ],
)
async def test_sizes_are_those_that_were_asked_for(client, handles, fields, size):
    told = (await submit(client, "flux-dev", **fields)).json()
    await poll(client, told["id"])
    [request] = handles.requests
    assert request.output_size == size
    has_warning = any("was scaled from" in warning for warning in told["details"]["warnings"])
    assert has_warning == ((request.width, request.height) != size)
    assert has_warning == bool(size[0] % 16 or size[1] % 16 or size[0] > 192)


async def test_what_has_no_effect_is_said(client):
    told = (
        await submit(
            client,
            "flux-dev",
            steps=4,
            guidance=3.0,
            safety_tolerance=2,
            prompt_upsampling=False,
            raw=True,
            colour="red",
            image_prompt=None,
        )
    ).json()
    assert told["details"] == {
        "served_model": "tiny",
        "warnings": [
            "guidance has no effect on tiny",
            "steps has no effect on tiny",
            "safety_tolerance has no effect on tiny",
            "raw has no effect on tiny",
            "unknown field 'colour' was ignored",
        ],
    }


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 33_000}, "prompt"),
        ({"seed": -2}, "seed"),
        ({"width": 32}, "width"),
        ({"width": 4096, "height": 2048}, "width"),
        ({"aspect_ratio": "9:1"}, "aspect_ratio"),
        ({"aspect_ratio": "wide"}, "aspect_ratio"),
        ({"output_format": "gif"}, "output_format"),
        ({"input_image": "no image"}, "input_image"),
        ({"input_image_3": "aGk="}, "input_image_3"),
        ({"input_image_9": "aGk="}, "input_image_9"),
        ({"images": ["aGk="]}, "images"),
        ({"image_url": "http://127.0.0.1/a.png"}, "image_url"),
        ({"image_prompt": "aGk="}, "image_prompt"),
        ({"mask": "aGk="}, "mask"),
        ({"top": 64}, "top"),
        ({"finetune_id": "mine"}, "finetune_id"),
    ],
)
async def test_wrong_fields_are_named_as_fastapi_does(client, handles, fields, field):
    answer = await submit(client, **fields)
    assert answer.status_code == 422
    [failure] = answer.json()["detail"]
    assert failure["loc"] == ["body", field]
    assert answer.json()["message"] == failure["msg"]
    assert not handles.requests


@pytest.mark.parametrize("has_mask", [True, False])
async def test_an_image_is_filled_where_its_mask_or_its_alpha_says(
    client, handles, make_image, has_mask
):
    clear = make_image(96, 80, mode="RGBA", color=(255, 0, 0, 0))
    fields = {"image": base64.b64encode(clear).decode()}
    if has_mask:
        fields |= {
            "image": base64.b64encode(make_image(96, 80)).decode(),
            "mask": base64.b64encode(make_image(96, 80, color="white")).decode(),
        }
    answer = await submit(client, "flux-dev", **fields)
    assert answer.status_code == 200, answer.text
    assert (await poll(client, answer.json()["id"]))["status"] == "Ready"
    [request] = handles.requests
    assert set(request.mask.marks) == {255}
    assert [(each.width, each.height) for each in request.references] == [(96, 80)]


async def test_what_is_to_be_filled_is_said(client, make_image):
    answer = await submit(client, image=base64.b64encode(make_image(96, 80)).decode())
    assert answer.status_code == 422
    assert "mask is required" in answer.json()["message"]


@pytest.mark.parametrize("names", [("control_image",), ("control_image", "preprocessed_image")])
async def test_a_job_follows_its_control_image(client, handles, make_image, monkeypatch, names):
    """The job is stored in between, with its image apart."""
    depth = replace(TINY, max_references=0, takes_mask=False, takes_control=True)
    monkeypatch.setitem(tiers._BY_NAME, "tiny", depth)
    colors = ("red", "blue")[: len(names)]
    images = {
        name: base64.b64encode(make_image(192, 128, color=color)).decode()
        for name, color in zip(names, colors, strict=True)
    }
    # As BFL's clients send them.
    sent = images | {"canny_low_threshold": 50, "steps": 50, "guidance": 30.0, "width": 96}
    told = (await submit(client, height=64, **sent)).json()
    assert (await poll(client, told["id"]))["status"] == "Ready"
    [request] = handles.requests
    assert request.follows_reference
    [control] = request.references
    assert (control.width, control.height) == (request.width, request.height) == (96, 64)
    last = {"red": b"\xff\0\0", "blue": b"\0\0\xff"}[colors[-1]]
    assert control.rgb[:3] == last
    warnings = told["details"]["warnings"]
    assert any("none are computed" in each for each in warnings) == (len(names) == 1)
    assert "canny_low_threshold has no effect on tiny" in warnings


async def test_a_job_is_steered(client, handles, monkeypatch):
    monkeypatch.setitem(tiers._BY_NAME, "tiny", replace(TINY, takes_negative=True))
    fields = {"negative_prompt": " a dot", "true_cfg_scale": 2, "allow_truncation": True}
    told = (await submit(client, **fields)).json()
    await poll(client, told["id"])
    [request] = handles.requests
    assert (request.negative_prompt, request.true_cfg_scale) == (" a dot", 2.0)
    assert request.allow_truncation
    assert told["details"]["warnings"] == []


async def test_other_errors_have_bfls_shape(client):
    missing = await client.get("/v1/get_result")
    assert missing.status_code == 422
    assert missing.json()["detail"][0]["loc"] == ["query", "id"]
    assert missing.json()["message"] == "id is required"
    wrong = await client.get("/v1/jobs", params={"limit": "many"})
    assert wrong.json()["message"].startswith("limit: input should be a valid integer")
    wrong = await client.post("/v1/tiny", content=b"prompt=x")
    assert wrong.status_code == 415
    assert wrong.json().keys() == {"detail", "message"}
    assert (await client.get("/v1/tiny")).json()["detail"] == "Method Not Allowed"
    unknown = await client.post("/v1/flux-none", json={"prompt": "x"})
    assert unknown.status_code == 404
    assert unknown.json().keys() == {"detail", "message"}


async def test_a_job_waits_while_there_is_no_room(client, turns, handles):
    turns.refusals = [Overloaded("busy", None, 1)]
    handles.failures = [ReplicaFailed("died"), ReplicaFailed("died")]
    told = (await submit(client)).json()
    result = await poll(client, told["id"])
    assert result["status"] == "Ready"


async def test_a_job_can_be_cancelled(client, handles, monkeypatch):
    started = asyncio.Event()

    async def generate_for_ever(request, replica, on_event=None):
        started.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(handles, "generate", generate_for_ever)
    told = (await submit(client)).json()
    await asyncio.wait_for(started.wait(), 10)
    cancelled = await client.post("/v1/cancel", params={"id": told["id"]}, headers={"x-key": "k"})
    assert cancelled.json()["status"] == "Error"
    assert cancelled.json()["details"]["error"]["code"] == "cancelled"


async def test_the_same_idempotency_key_is_the_same_job(client, handles):
    async def send(words: str) -> httpx.Response:
        headers = {"x-key": "k", "idempotency-key": "mine"}
        return await client.post("/v1/tiny", json={"prompt": words}, headers=headers)

    first, second = await send("a red circle"), await send("a red circle")
    assert first.json() | {"status": ""} == second.json() | {"status": ""}
    assert first.json()["id"] == second.json()["id"]
    assert (await send("a blue circle")).status_code == 422
    await poll(client, first.json()["id"])
    assert len(handles.requests) == 1


async def test_there_are_no_finetunes(client):
    assert (await client.get("/v1/my_finetunes")).json() == {"finetunes": []}
