"""Whatever goes wrong, the answer is OpenAI's error envelope with an id, and the server goes on."""

import logging

import httpx
import pytest

from flux_ray.errors import ReplicaFailed, TierUnavailable
from flux_ray.gateway.api import build_api

PATH = "/v1/images/generations"
REQUEST = {"prompt": "a red circle"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/redoc", 404, "not_found"),
        ("GET", "/playground/nothing.js", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("POST", "/v1/images/generations/", 404, "not_found"),
        ("GET", PATH, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_routes_that_are_not_there(client, method, path, status, code):
    answer = await client.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"]


async def test_an_unknown_failure_shows_nothing_and_is_logged(client, handles, serve_log):
    handles.failures = [RuntimeError("secret /home/someone 0x7f")]
    answer = await client.post(PATH, json=REQUEST, headers={"x-request-id": "abc"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "abc"
    assert "abc" in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert "secret" in serve_log.text
    errors = [record.name for record in serve_log.records if record.levelno == logging.ERROR]
    assert errors == ["ray.serve"]
    assert (await client.post(PATH, json=REQUEST)).status_code == 200


async def test_an_unknown_failure_is_raised_again(api, handles):
    handles.failures = [RuntimeError("ours")]
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        with pytest.raises(RuntimeError, match="ours"):
            await client.post(PATH, json=REQUEST)


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([TierUnavailable("tiny cannot serve now")], "tier_unavailable"),
        ([ReplicaFailed("a rank died"), ReplicaFailed("a rank died")], "replica_failed"),
    ],
)
async def test_503_says_when_to_come_back(client, handles, failures, code):
    handles.failures = failures
    answer = await client.post(PATH, json=REQUEST)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["type"] == "server_error"
    assert int(answer.headers["retry-after"]) > 0


async def test_one_dead_replica_is_not_seen_by_the_caller(client, handles):
    handles.failures = [ReplicaFailed("a rank died")]
    answer = await client.post(PATH, json=REQUEST)
    assert answer.status_code == 200
    first, second = handles.requests
    assert first == second


@pytest.mark.parametrize("sent", ["my-id", "0123456789abcdef", "a" * 128])
async def test_the_clients_id_is_echoed(client, sent):
    answer = await client.get("/health", headers={"x-request-id": sent})
    assert answer.headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "a" * 129, "two words", "{jndi}", "a\tb"])
async def test_an_unusable_id_is_replaced(client, sent):
    answer = await client.get("/health", headers={"x-request-id": sent})
    assert answer.headers["x-request-id"] != sent
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize("failures", [[], [RuntimeError("ours")]])
async def test_behind_a_proxy_the_id_is_the_proxys_to_send(handles, router, gateway_args, failures):
    handles.failures = failures
    api = build_api(router, gateway_args, proxy_sends_id=True)
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.post(PATH, json=REQUEST, headers={"x-request-id": "abc"})
    assert "x-request-id" not in answer.headers


FORM_START = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'


async def chunks(body):
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


@pytest.mark.parametrize("path", [PATH, "/v1/images/edits"])
@pytest.mark.parametrize("is_told", [True, False])
async def test_too_large_a_body(client, handles, path, is_told):
    content_type = "application/json" if path == PATH else "multipart/form-data; boundary=x"
    body = FORM_START + b" " * 1_000_000
    content = body if is_told else chunks(body)
    answer = await client.post(path, content=content, headers={"content-type": content_type})
    assert answer.status_code == 413, answer.text
    assert answer.json()["error"]["code"] == "request_too_large"
    assert handles.requests == []


@pytest.mark.parametrize("path", [PATH, "/v1/images/edits"])
async def test_a_client_that_leaves_in_mid_upload_is_no_failure(api, handles, serve_log, path):
    content_type = b"application/json" if path == PATH else b"multipart/form-data; boundary=x"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", content_type)],
    }
    received = iter(
        [
            {"type": "http.request", "body": FORM_START, "more_body": True},
            {"type": "http.disconnect"},
        ]
    )
    sent = []

    async def receive():
        return next(received)

    async def send(message):
        sent.append(message)

    await api(scope, receive, send)
    assert sent[0]["status"] == 499
    assert [record for record in serve_log.records if record.levelno >= logging.WARNING] == []
    assert handles.requests == []


@pytest.mark.parametrize("host", ["evil.example", "x/?", "a@b", "gateway:99999"])
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/", "/openapi.json"])
async def test_nothing_is_made_of_the_host_header(client, path, host):
    plain = await client.get(path)
    answer = await client.get(path, headers={"host": host})
    assert (answer.status_code, answer.text) == (plain.status_code, plain.text)
    assert host not in str(answer.headers)
