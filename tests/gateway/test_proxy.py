"""How Serve's proxies read HTTP: Ray's own server, without a cluster, in its environment."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions
from uvicorn.config import HTTP_PROTOCOLS

from flux_ray.config import PROXY_CALLBACK, READ_WITH_H11

OFFERS = {
    "a JDK's HttpClient": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "another protocol": "Connection: upgrade\r\nUpgrade: TLS/1.2, IRC/6.9\r\n",
    "words that differ": "connection: keep-alive, UPGRADE\r\nupgrade: H2C\r\n",
}
BODY = b'{"prompt": "a ring"}'
WHOLE = b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"


async def echo(scope, receive, send):
    """Answer with the body, in two parts, as streams are answered."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.fixture
def app():
    return echo


@pytest.fixture
async def port(monkeypatch, app) -> AsyncIterator[int]:
    """Of a server as Serve's proxies start it, where the variable names our function."""
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    monkeypatch.setattr(http_util, PROXY_CALLBACK, READ_WITH_H11)
    options = http_util.configure_http_middlewares(
        http_util.configure_http_options_with_defaults(HTTPOptions(host="127.0.0.1", port=0))
    )
    loop = asyncio.get_running_loop()
    serving, server = await http_util.start_asgi_http_server(app, options, event_loop=loop)
    while not server.started:  # noqa: ASYNC110 - it tells by a flag only
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def answer_to(port: int, *request: bytes) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in request:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(30):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("body", [WHOLE, CHUNKED], ids=["whole", "chunked"])
async def test_an_offer_to_upgrade_is_ignored_and_the_body_read(port, offer, body):
    head = f"POST / HTTP/1.1\r\nHost: a\r\n{offer}".encode()
    # The second request ends the connection, which the first has left whole.
    last = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\n\r\nlast"
    answer = await answer_to(port, head + body, last)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert BODY in answer and b"last" in answer


async def test_headers_without_an_end_are_refused(port):
    """Before any key is asked, each connection could have all of the memory."""
    head = b"GET / HTTP/1.1\r\nHost: a\r\n"
    answer = await answer_to(
        port, head, *[b"X-%d: " % n + b"a" * 2000 + b"\r\n" for n in range(99)]
    )
    assert b" 200 " not in answer


async def test_an_old_client_is_sent_no_chunks(port):
    answer = await answer_to(port, b"POST / HTTP/1.0\r\n" + WHOLE)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body == BODY


async def silent(scope, receive, send):
    """What Serve does under whom a gateway has died: it answers nothing."""
    assert scope["type"] == "http"


@pytest.mark.parametrize("app", [silent])
async def test_an_answer_that_never_comes_is_made(port):
    """Where uvicorn would say `Internal Server Error`, in plain text."""
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    answer = await answer_to(port, head + WHOLE)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nx-should-retry: true\r\n" in answer
    assert b'"code":"gateway_failed"' in answer
