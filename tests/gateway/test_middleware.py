"""With a keys file only callers with a live key get in, whatever the route."""

import hashlib
import re
from datetime import UTC, datetime

import httpx
import pytest

from flux_ray.auth.keys import KeyFile, new_key, without_key, write_keys
from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.middleware import OPEN
from flux_ray.gateway.playground.pages import is_page
from tests.conftest import LIMITS

PATH = "/v1/images/generations"
HUB = "/models/{model:path}"
NOW = datetime(2026, 11, 1, tzinfo=UTC)
ALICE, BOB, REVOKED = (new_key(name, None, NOW) for name in ("alice", "bob", "revoked"))
ALICE_TOO = new_key("alice", None, NOW)
EXPIRED = new_key("expired", None, NOW, NOW)
FILE = KeyFile(keys=(ALICE.key, ALICE_TOO.key, BOB.key, REVOKED.key, EXPIRED.key))
WRONG = {
    "nothing": {},
    "empty": {"authorization": ""},
    "no token": {"authorization": "Bearer "},
    "unknown": {"authorization": f"Bearer {new_key('x', None, NOW).secret}"},
    "revoked": {"authorization": f"Bearer {REVOKED.secret}"},
    "expired": {"authorization": f"Bearer {EXPIRED.secret}"},
    "a prefix": {"x-key": ALICE.key.prefix},
    "two halves": {"x-key": ALICE.secret[:20] + BOB.secret[20:]},
    "its hash": {"x-key": ALICE.key.sha256},
    "another scheme": {"authorization": f"Basic {ALICE.secret}"},
    "twice": {"authorization": f"Bearer {ALICE.secret} {ALICE.secret}"},
    "long": {"x-key": "fr-" + "a" * 5000},
    "odd": {"x-key": "\x80\xff fr-"},
    "wrong one first": {"authorization": "Bearer no", "x-key": ALICE.secret},
}


@pytest.fixture
def gateway_args(tmp_path):
    write_keys(tmp_path / "keys.yaml", without_key(FILE, "revoked", NOW))
    return GatewayArgs(tiers=("tiny",), limits=LIMITS, keys_file=tmp_path / "keys.yaml")


def encoded(headers):
    return {name: value.encode("latin-1") for name, value in headers.items()}


def routes_of(router):
    """All of them, also those of the routers inside."""
    for route in router.routes:
        if hasattr(route, "original_router"):
            yield from routes_of(route.original_router)
        else:
            yield route


def operations(api):
    """Every route that is there, and some that are not."""
    plain = {(method, route.path) for route in routes_of(api) for method in route.methods}
    described = api.openapi()["paths"]
    assert {path.replace(":path", "") for _, path in plain} >= described.keys()
    odd = {("GET", "/nothing"), ("OPTIONS", PATH), ("GET", "//health"), ("GET", "/health/")}
    near = {"/readyz/../v1/models", "/HEALTH", "/results", "//results/x"}
    return sorted(plain | odd | {("GET", path) for path in near})


async def test_every_route_but_the_open_ones_is_closed(api, client, handles):
    walked = set()
    for method, template in operations(api):
        path = re.sub(r"\{[^}]*\}", "tiny", template)
        for what, headers in WRONG.items():
            answer = await client.request(method, path, headers=encoded(headers))
            # By the address that was asked: `//health` is `/` of a host of that name.
            if template in OPEN or is_page(answer.request.url.path):
                assert answer.status_code in (200, 404, 405), (method, path)
                continue
            assert answer.status_code == 401, (method, path, what)
            walked.add(template)
    models = {"/v1/models", "/v1/models/{model:path}"}
    assert walked >= {PATH, "/v1/images/edits", *models, HUB, "/nothing"}
    assert handles.requests == []


@pytest.mark.parametrize(
    ("path", "status"),
    [("/results/x", 404), ("/results/", 404), ("/results/../v1/models", 404), ("/results", 401)],
)
async def test_only_what_is_below_results_is_open(api, path, status):
    """As it comes, for httpx would tidy the path up."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
    await api(scope, None, send)
    assert sent[0]["status"] == status


async def test_nobody_learns_what_is_wrong_with_a_key(client):
    answers = [await client.get("/v1/models", headers=encoded(each)) for each in WRONG.values()]
    assert len({answer.content for answer in answers}) == 1
    for answer in answers:
        assert answer.json()["error"] == {
            "message": "send a valid API key, as `Authorization: Bearer`, `x-key` or `x-api-key`",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]
        assert {*answer.headers} == {*answers[0].headers}


async def test_hugging_faces_clients_are_told_in_their_way(client):
    answer = await client.post("/models/tiny", json={"inputs": "a ring"})
    assert answer.status_code == 401
    assert answer.json()["error_type"] == "invalid_api_key"
    headers = {"authorization": f"Bearer {ALICE.secret}"}
    answer = await client.post("/models/tiny", json={"inputs": "a ring"}, headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "x/?", "a@b", "gateway:99999", "[", "é"])
async def test_a_closed_door_makes_nothing_of_the_host(client, host):
    answer = await client.get("/v1/models", headers={"host": host.encode()})
    assert answer.status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer {}", "bearer  {}", "Token {}", "Key {}", "{}"])
async def test_keys_are_read_as_clients_spell_them(client, scheme):
    headers = {"authorization": scheme.format(ALICE.secret)}
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_bfls_header_is_read(client):
    assert (await client.get("/v1/models", headers={"X-Key": ALICE.secret})).status_code == 200


async def test_the_keys_of_one_name_are_one_caller(client, turns):
    for each in (ALICE, ALICE_TOO, BOB):
        answer = await client.post(PATH, json={"prompt": "a ring"}, headers={"x-key": each.secret})
        assert answer.status_code == 200, answer.text
    assert [offer.key for offer in turns.submissions] == ["alice", "alice", "bob"]


async def test_the_log_has_the_name_and_not_the_secret(client, serve_log):
    await client.post(PATH, json={"prompt": "a ring"}, headers={"x-key": ALICE.secret})
    await client.post(PATH, json={"prompt": "a ring"}, headers={"x-key": "fr-wrong-one"})
    assert "on tiny for alice" in serve_log.text
    assert ALICE.secret not in serve_log.text and "wrong-one" not in serve_log.text


async def test_a_closed_door_reads_no_body(client):
    async def endless():
        yield b"{"
        raise AssertionError("nobody should have asked for more")

    answer = await client.post(PATH, content=endless())
    assert answer.status_code == 401


async def test_openapi_tells_of_keys(client):
    described = (await client.get("/openapi.json")).json()
    schemes = described["components"]["securitySchemes"].values()
    assert {scheme["type"] for scheme in schemes} == {"http", "apiKey"}
    assert len(described["paths"][PATH]["post"]["security"]) == 3
    assert "security" not in described["paths"]["/health"]["get"]


def test_a_gateway_whose_keys_cannot_be_read_does_not_start(router, gateway_args):
    gateway_args.keys_file.write_text("keys: 3")
    with pytest.raises(ValueError, match="keys: Input should be"):
        build_api(router, gateway_args)


async def test_without_a_keys_file_everybody_is_let_in(router, turns):
    api = build_api(router, GatewayArgs(tiers=("tiny",), limits=LIMITS))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=api), base_url="http://gateway"
    ) as client:
        for headers in ({}, {"authorization": "Bearer none"}, {"x-key": "none"}):
            answer = await client.post(PATH, json={"prompt": "a ring"}, headers=headers)
            assert answer.status_code == 200
        described = (await client.get("/openapi.json")).json()
    hashed = hashlib.sha256(b"none").hexdigest()[:16]
    assert [offer.key for offer in turns.submissions] == ["", hashed, hashed]
    assert "securitySchemes" not in described["components"]
