"""The pages as they are sent: routes, headers, keys, and the switch that turns them off."""

import gzip
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from flux_ray.auth.keys import KeyFile, write_keys
from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.gateway.intake import Intake
from flux_ray.gateway.openai.request import NEGATIVE_SCALE
from flux_ray.gateway.playground.pages import FOLDER, PAGES
from tests.conftest import LIMITS

NAMES = sorted(path.name for path in FOLDER.iterdir())
FILES = [name for name in NAMES if name not in PAGES.values()]
PATHS = [*PAGES, *(f"/playground/{name}" for name in FILES)]
PAGE_NAMES = sorted(PAGES.values())


@asynccontextmanager
async def client_of(router, **args: object) -> AsyncIterator[httpx.AsyncClient]:
    api = build_api(router, GatewayArgs(tiers=("tiny",), limits=LIMITS, **args))
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_sent_lets_nothing_else_in(client, path):
    answer = await client.get(path)
    assert answer.status_code == 200
    rules = answer.headers["content-security-policy"].split("; ")
    assert "default-src 'self'" in rules
    assert "img-src 'self' data: blob:" in rules
    assert "frame-ancestors 'none'" in rules
    assert not any("unsafe" in rule or "http" in rule or "*" in rule for rule in rules)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    head = await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize("path", PATHS)
async def test_what_a_browser_has_is_not_sent_again(client, path):
    first = await client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}'):
        again = await client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert "content-security-policy" in again.headers
    assert (await client.get(path, headers={"if-none-match": '"other"'})).status_code == 200


async def test_files_are_packed_for_who_reads_that(client):
    path = "/playground/style.css"
    packed = await client.get(path, headers={"accept-encoding": "gzip, br"})
    plain = await client.get(path, headers={"accept-encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content == (FOLDER / "style.css").read_bytes()
    assert packed.headers["etag"] != plain.headers["etag"]
    assert packed.headers["vary"] == "accept-encoding"


def test_the_playground_is_small():
    sent = [gzip.compress((FOLDER / name).read_bytes()) for name in NAMES]
    assert sum(map(len, sent)) < 48_000


async def test_types_are_those_that_browsers_run(client):
    kinds = {path: (await client.get(path)).headers["content-type"] for path in PATHS}
    assert kinds["/"] == kinds["/docs"] == "text/html; charset=utf-8"
    assert kinds["/playground/app.js"].startswith("text/javascript")
    assert kinds["/playground/icon.svg"] == "image/svg+xml"


@pytest.mark.parametrize(
    "path",
    [
        "/playground/",
        "/playground/playground.html",
        "/playground/../app.js",
        "/playground/%2e%2e/pages.py",
        "/playground/pages.py",
        "/playground/static/app.js",
        "/redoc",
    ],
)
async def test_nothing_else_is_sent(client, path):
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", PATHS)
async def test_pages_can_be_turned_off(router, path):
    async with client_of(router, playground=False) as client:
        answer = await client.get(path)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "not_found")
        assert "GET /v1/models lists the models" in error["message"]
        assert (await client.get("/openapi.json")).status_code == 200


async def test_pages_need_no_key_and_what_they_ask_for_does(router, tmp_path):
    keys = tmp_path / "keys.yaml"
    write_keys(keys, KeyFile(keys=()))
    async with client_of(router, keys_file=keys) as client:
        for path in PATHS:
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
    async with client_of(router, keys_file=keys, playground=False) as client:
        # As any other path that is not there: strangers are told nothing.
        assert (await client.get("/")).status_code == 401


@pytest.mark.parametrize("path", ["/", "/docs", "/playground/app.js"])
async def test_pages_come_from_a_full_gateway_too(router, path, monkeypatch):
    args = GatewayArgs(tiers=("tiny",), limits=LIMITS)
    api = build_api(router, args)
    monkeypatch.setattr(GatewayArgs, "max_requests", 0)
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        assert Intake(api, args=args).max_requests == 0
        assert (await client.get(path)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 503


@pytest.mark.parametrize("name", NAMES)
def test_files_name_no_other_host(name):
    text = (FOLDER / name).read_text()
    hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text))
    # A name of a vocabulary, which nobody fetches.
    assert hosts <= {"http://www.w3.org"}


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_pages_have_no_inline_script_or_style(name):
    text = (FOLDER / name).read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", text)
    asked = set(re.findall(r'(?:src|href)="playground/([^"]+)"', text))
    assert asked <= set(FILES)


def test_every_module_is_loaded_at_once():
    """A module that the page does not name is found only when another one was read."""
    text = (FOLDER / "playground.html").read_text()
    named = set(re.findall(r'"playground/(\w+\.js)"', text))
    assert named == {name for name in FILES if name.endswith(".js")} - {"docs.js"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".js", ".css"))])
def test_files_are_short_and_say_their_job(name):
    lines = (FOLDER / name).read_text().splitlines()
    assert len(lines) <= 400
    assert lines[0].startswith(("//", "/*"))
    assert not [line for line in lines if "innerHTML" in line or "eval(" in line]


async def test_models_say_what_the_page_shows(router):
    async with client_of(router) as client:
        [tiny] = (await client.get("/v1/models")).json()["data"]
    assert (tiny["min_side"], tiny["size_multiple"]) == (64, 16)
    assert (tiny["takes_guidance"], tiny["default_guidance"]) == (False, 1.0)
    assert (tiny["max_images"], tiny["max_prompt_chars"]) == (4, 1000)
    assert tiny["is_default"]


def test_a_negative_prompt_has_the_gateways_scale():
    assert f"NEGATIVE_SCALE = {NEGATIVE_SCALE:g};" in (FOLDER / "models.js").read_text()
