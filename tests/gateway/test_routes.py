"""Models, health and the OpenAPI description."""

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flux_ray.config.gateway import GatewayArgs
from flux_ray.errors import BadRequest
from flux_ray.gateway.api import build_api
from flux_ray.gateway.model_names import target_for


async def test_models(client):
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    [model] = body["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "flux-ray")
    assert model["license"] == "apache-2.0"
    assert (model["default_size"], model["default_steps"]) == ("128x128", 4)
    assert (await client.get("/v1/models/tiny")).json() == model


async def test_a_name_with_a_slash(router, client):
    name = "black-forest-labs/FLUX.1-dev"
    api = build_api(router, GatewayArgs(tiers=("tiny",), aliases={name: "tiny"}))
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for path in (name, name.replace("/", "%2F")):
            assert (await client.get(f"/v1/models/{path}")).json()["id"] == name


async def test_a_tier_that_is_not_served_here(client):
    answer = await client.get("/v1/models/flux-2-klein-4b")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_health_and_readiness(client, handles):
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"tiers": ["tiny"]}
    handles.ready = ()
    assert (await client.get("/health")).status_code == 200
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "tier_unavailable")


async def test_a_change_of_readiness_is_logged_once(client, handles, serve_log):
    for ready in ((), ("tiny",), (), ("tiny",)):
        handles.ready = ready
        for method in ("GET", "HEAD", "GET"):
            answer = await client.request(method, "/readyz")
            assert answer.status_code == (200 if ready else 503)
    seen = [(record.levelname, record.getMessage()) for record in serve_log.records]
    unready = "the gateway is not ready: no tier can serve now"
    assert seen == [
        ("INFO", unready),
        ("INFO", "the gateway is ready"),
        ("WARNING", unready),
        ("INFO", "the gateway is ready"),
    ]


async def test_health_and_readiness_by_head(client, handles):
    for path in ("/health", "/readyz"):
        answer = await client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    handles.ready = ()
    assert (await client.head("/health")).status_code == 200
    assert (await client.head("/readyz")).status_code == 503


async def test_the_gateway_begins_no_trace_beside_serves(client, monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    with provider.get_tracer("serve").start_as_current_span("of Serve"):
        assert (await client.get("/v1/models")).status_code == 200
    assert [span.name for span in exporter.get_finished_spans()] == ["of Serve"]


async def test_openapi_names_every_operation_once(client):
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths["/health"]) == set(paths["/readyz"]) == {"get"}
    ids = [operation["operationId"] for path in paths.values() for operation in path.values()]
    assert len(ids) == len(set(ids)) == 7


async def test_openapi_describes_the_bodies(client):
    paths = (await client.get("/openapi.json")).json()["paths"]
    [(json_type, json_body)] = paths["/v1/images/generations"]["post"]["requestBody"][
        "content"
    ].items()
    edits = paths["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert (json_type, {*edits}) == (
        "application/json",
        {"application/json", "multipart/form-data"},
    )
    form_body = edits["multipart/form-data"]
    assert json_body["schema"]["required"] == ["prompt"]
    assert {"prompt", "model", "n", "size", "seed"} <= json_body["schema"]["properties"].keys()
    assert form_body["schema"]["properties"]["image[]"]["items"]["format"] == "binary"
    for name in ("image", "images", "url", "ref_images", "reference_image"):
        assert {"required": [name]} in edits["application/json"]["schema"]["anyOf"]
        assert name in json_body["schema"]["properties"]
    for operation in (paths["/v1/images/generations"]["post"], paths["/v1/images/edits"]["post"]):
        assert operation["responses"].keys() == {"200", "default"}


TWO = ("tiny", "flux-2-klein-4b")


def test_model_may_be_left_out():
    assert target_for(None, GatewayArgs(tiers=("tiny",))).name == "tiny"
    args = GatewayArgs(tiers=TWO, default_tier="flux-2-klein-4b")
    assert target_for(None, args).name == "flux-2-klein-4b"


def test_model_is_required_where_there_is_no_default():
    with pytest.raises(BadRequest, match="model is required") as caught:
        target_for(None, GatewayArgs(tiers=TWO))
    assert caught.value.field == "model"
