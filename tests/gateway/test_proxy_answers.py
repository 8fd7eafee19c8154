"""What Serve's proxies say when a gateway dies: in the dialect's shape, with when to come again."""

import json
from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware, convert_object_to_asgi_messages

from flux_ray.gateway.http import is_ours
from flux_ray.gateway.proxy_middleware import ProxyAnswers
from tests.gateway.streaming import event_of

GENERATIONS = "/v1/images/generations"


class Proxy:
    """Serve's, behind its own middleware: it answers with `messages`, and then may fail."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.ids: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.ids = [value.decode() for name, value in scope["headers"] if name == b"x-request-id"]
        for message in self.messages:
            await send(message)
        if self.error is not None:
            raise self.error

    def says(self, text: str, status: int) -> None:
        """As Serve makes an answer of its own."""
        self.messages = convert_object_to_asgi_messages(text, status_code=status)

    def begins(self, kind: bytes, *parts: bytes) -> None:
        """A gateway's answer without its end."""
        headers = [(b"content-type", kind)]
        self.messages = [{"type": "http.response.start", "status": 200, "headers": headers}]
        self.messages += [
            {"type": "http.response.body", "body": part, "more_body": True} for part in parts
        ]


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
async def client(proxy: Proxy) -> Any:
    app = ProxyAnswers(RequestIdMiddleware(proxy))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
        yield client


OPENAI = ("error", "code")
HUB = ("error_type",)
BFL: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("method", "path", "code_at"),
    [
        ("POST", GENERATIONS, OPENAI),
        ("POST", "/v1/images/edits", OPENAI),
        ("GET", "/v1/models", OPENAI),
        ("GET", "/readyz", OPENAI),
        ("POST", "/models/tiny", HUB),
        ("POST", "/v1/flux-2-dev", BFL),
        ("POST", "/v1/cancel", BFL),
        ("GET", "/v1/get_result", BFL),
        ("POST", "/proxy/bfl/tiny/generate", BFL),
    ],
)
@pytest.mark.parametrize(("said", "status"), [(None, 0), ("dead", 500), ("unavailable", 503)])
async def test_a_gateway_that_died_is_told_in_the_dialects_shape(
    proxy, client, method, path, code_at, said, status
):
    """Of a dead one Serve says nothing at all, and uvicorn `Internal Server Error`."""
    if said is not None:
        proxy.says(said, status)
    answer = await client.request(method, path, headers={"x-request-id": "mine"})
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["retry-after"] == "1"
    assert answer.headers.get_list("x-request-id") == ["mine"]
    told = answer.json()
    if code_at == BFL:
        assert "idempotency-key" in told["detail"] == told["message"]
        return
    for name in code_at:
        told = told[name]
    assert told == "gateway_failed"


async def test_a_request_that_took_too_long_is_not_to_come_again(proxy, client):
    proxy.says("Request x timed out after 1s.", 408)
    answer = await client.post(GENERATIONS)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    assert answer.json()["error"]["code"] == "deadline_passed"


async def test_a_mistake_in_the_proxy_is_told_too(proxy, client):
    proxy.error = RuntimeError("secret")
    answer = await client.post(GENERATIONS)
    assert answer.json()["error"]["code"] == "gateway_failed"
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 500),
        ("application/json", 200),
        ("text/plain; charset=utf-8", 200),
        ("text/plain", 404),
        ("image/png", 200),
    ],
)
async def test_what_a_gateway_answers_is_as_it_was(proxy, client, kind, status):
    headers = [(b"content-type", kind.encode())]
    proxy.messages = [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": b"a", "more_body": True},
        {"type": "http.response.body", "body": b"b"},
    ]
    answer = await client.post(GENERATIONS)
    assert (answer.status_code, answer.content) == (status, b"ab")
    assert answer.headers["content-type"] == kind


async def test_a_stream_that_is_cut_ends_with_an_error(proxy, client):
    proxy.begins(b"text/event-stream; charset=utf-8", b": queued\n\n", b"event: image_gen")
    answer = await client.post(GENERATIONS)
    blocks = [block for block in answer.text.split("\n\n") if block]
    assert blocks[:2] == [": queued", "event: image_gen"]
    name, data = event_of(blocks[2])
    assert (name, data["error"]["code"]) == ("error", "gateway_failed")
    assert data["retry_after_s"] == 1


async def test_of_half_an_image_no_whole_one_is_made(proxy):
    """Its length tells the client; a word more would be a part of it."""
    proxy.begins(b"image/png", b"half")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/models/tiny", "headers": []}
    await ProxyAnswers(RequestIdMiddleware(proxy))(scope, None, send)
    assert [message.get("body") for message in sent] == [None, b"half"]


@pytest.mark.parametrize("path", ["/-/healthz", "/-/routes"])
async def test_serves_own_routes_answer_as_they_do(proxy, client, path):
    proxy.says("draining", 503)
    answer = await client.get(path)
    assert (answer.status_code, answer.text) == (503, "draining")


@pytest.mark.parametrize("sent", [None, "two words", "x" * 5000])
async def test_an_id_that_is_none_is_replaced_before_serve_logs_it(proxy, client, sent):
    proxy.says("dead", 500)
    answer = await client.post(GENERATIONS, headers={} if sent is None else {"x-request-id": sent})
    [number] = proxy.ids
    assert is_ours(number)
    assert answer.headers.get_list("x-request-id") == [number]


async def test_a_clients_id_is_kept(proxy, client):
    await client.post(GENERATIONS, headers={"x-request-id": "mine"})
    assert proxy.ids == ["mine"]


async def test_the_body_of_a_failure_is_json(client):
    assert json.loads((await client.post(GENERATIONS)).content)["error"]["type"] == "server_error"
