"""How Serve's proxies read HTTP: Ray's own server, without a cluster, in its environment."""

import asyncio
import resource
from collections.abc import AsyncIterator
from types import SimpleNamespace
from unittest.mock import Mock

import h11
import pytest
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions
from uvicorn.config import HTTP_PROTOCOLS, Config
from uvicorn.server import ServerState

from flux_ray.config.tier import PROXY_CALLBACK, READ_WITH_H11
from flux_ray.gateway import proxy

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
    """Answer with the body, in two parts, as streams are answered.

    Or with the headers, with a lot, or at once.
    """
    if scope["path"] != "/":
        lines = [name + b": " + value for name, value in scope["headers"]]
        bodies = {"/headers": b"\n".join(lines), "/large": b"x" * 40_000_000, "/at-once": b"no"}
        length = str(len(bodies[scope["path"]])).encode()
        headers = [(b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bodies[scope["path"]]})
        return
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


async def test_a_head_without_an_end_is_not_kept(port):
    """However many connections send one, and however fast."""
    line = b"X-Long: " + b"a" * 2**20 + b"\r\n"
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    heads = [b"GET / HTTP/1.1\r\nHost: a\r\n", *[line] * 20]
    answers = await asyncio.gather(*(answer_to(port, *heads) for _ in range(8)))
    assert all(b" 200 " not in answer for answer in answers)
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    assert grown_kb < 40_000, "of 160 MB that were sent"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost:",
        b"GET /headers HTTP/1.1\r\nHost: a\r\n\r\nGET /head",
        b"POST /at-once HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n123456789",
    ],
    ids=["nothing", "half a head", "half a second head", "a body too late"],
)
async def test_who_sends_no_head_is_not_waited_for(port, monkeypatch, sent):
    """A byte now and then does not help."""
    for name in ("HEAD_S", "REST_S"):
        monkeypatch.setattr(proxy, name, 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def drip() -> None:
        # More slowly than uvicorn itself would wait, each byte would begin that anew.
        for byte in b"a" * 600:
            writer.write(bytes([byte]) if sent else b"")
            await asyncio.sleep(0.05)

    writer.write(sent[:-1])
    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(120):
            answer = await reader.read()
    except ConnectionError:
        answer = b""
    assert answer.count(b" 200 ") <= 1
    dripping.cancel()
    writer.close()


class Timers:
    """An event loop that only counts the seconds that are waited for."""

    def __init__(self):
        self.waiting: dict[object, float] = {}

    def call_later(self, seconds, callback, *args):
        timer = SimpleNamespace(cancel=lambda: self.waiting.pop(timer_id, None))
        timer_id = id(timer)
        self.waiting[timer_id] = seconds
        self.last = lambda: callback(*args)
        return timer

    def create_task(self, coroutine):
        coroutine.close()
        return Mock()

    @property
    def seconds(self):
        return sorted(self.waiting.values())


@pytest.fixture
def timers() -> Timers:
    return Timers()


@pytest.fixture
def protocol(timers) -> proxy.ImpatientProtocol:
    """Of a connection that was just made."""
    config = Config(echo, timeout_keep_alive=5, log_config=None)
    protocol = proxy.ImpatientProtocol(config, ServerState(), {}, timers)
    transport = Mock(**{"get_extra_info.return_value": None, "is_closing.return_value": False})
    protocol.connection_made(transport)
    return protocol


def answer(protocol: proxy.ImpatientProtocol) -> None:
    """What uvicorn does once an answer is written."""
    protocol.conn.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
    protocol.conn.send(h11.EndOfMessage())
    protocol.on_response_complete()


def test_a_client_has_its_time_for_each_head(protocol, timers):
    assert timers.seconds == [proxy.HEAD_S]
    protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\n")
    assert timers.seconds == [proxy.HEAD_S], "the same one"
    protocol.data_received(b"Content-Length: 4\r\n\r\nsl")
    assert timers.seconds == [], "bodies have limits where it is known whose they are"
    protocol.data_received(b"ow")
    assert timers.seconds == []
    answer(protocol)
    assert timers.seconds == [5], "of uvicorn, for a client that may have no more to ask"
    protocol.data_received(b"GET / HT")
    assert timers.seconds == [proxy.HEAD_S]
    protocol.connection_lost(None)
    assert timers.seconds == []


def test_a_body_that_is_answered_already_has_its_time(protocol, timers):
    protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n")
    answer(protocol)
    assert timers.seconds == [5, proxy.REST_S]
    for _ in range(3):
        protocol.data_received(b"1")
        assert timers.seconds == [proxy.REST_S], "the same one"
    timers.last()
    assert protocol.transport.close.called or protocol.transport.abort.called


def test_chunks_of_a_byte_are_not_read_by_the_thousand(protocol):
    """Ten microseconds each, while everybody waits."""
    protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    protocol.data_received(b"1\r\nx\r\n" * 4000)
    assert not protocol.transport.abort.called
    protocol.data_received(b"1\r\nx\r\n" * 5000)
    assert protocol.transport.abort.called


def test_an_answer_that_is_read_slowly_is_sent_whole(protocol, timers):
    transport = protocol.transport
    transport.get_write_buffer_size.return_value = 50
    protocol.pause_writing()
    for num_left in (49, 20, 19):
        transport.get_write_buffer_size.return_value = num_left
        timers.last()
        assert not transport.abort.called
    timers.last()
    assert transport.abort.called


async def test_an_answer_that_nobody_reads_is_not_kept(port, monkeypatch):
    """While it waits, it is in memory, and has a place among those whom Serve serves."""
    monkeypatch.setattr(proxy, "UNREAD_S", 0.3)
    head = b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    writer.write(head)
    await reader.readexactly(1)
    await asyncio.sleep(1.5)
    num_read = 0
    try:
        while more := await reader.read(2**20):
            num_read += len(more)
    except ConnectionError:
        pass
    assert num_read < 40_000_000
    writer.close()


@pytest.mark.parametrize(
    "lines",
    [[b"x-%d: 1" % number for number in range(129)], [b"x: " + b"a" * 33_000]],
    ids=["many", "long"],
)
async def test_a_head_that_comes_at_once_is_bounded_too(port, lines):
    """h11 counts only those that come in pieces."""
    head = b"GET /headers HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    assert b" 200 " in await answer_to(port, head + b"\r\n".join(lines[:100])[:8000] + b"\r\n\r\n")
    answer = await answer_to(port, head + b"\r\n".join(lines) + b"\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    path = b"GET /headers?" + b"a" * 33_000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    assert b" 200 " not in await answer_to(port, path)


async def test_a_body_of_two_lengths_is_refused(port):
    """And with it what may be another's request, hidden in it."""
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    hidden = b"GET /headers HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = await answer_to(port, head + b"0\r\n\r\n" + hidden)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1


IDS = {"plain": b"my-id.7", "long": b"a" * 5000, "odd": b"a b", "none": b"", "others": b"\xff\x1b"}


@pytest.mark.parametrize("sent", IDS.values(), ids=IDS)
async def test_an_id_that_is_long_or_odd_is_not_taken(port, sent):
    """Serve itself would answer with it, and write it into its logs three times."""
    head = b"GET /headers HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Request-ID: "
    answer = await answer_to(port, head + sent + b"\r\nx-request-id: again\r\n\r\n")
    told, _, body = answer.lower().partition(b"\r\n\r\n")
    (known,) = [line[14:] for line in body.split(b"\n") if line.startswith(b"x-request-id: ")]
    assert b"x-request-id: " + known + b"\r\n" in told
    assert (known == sent) is (sent == IDS["plain"])
    assert len(known) <= 128


@pytest.mark.parametrize(
    "name",
    [
        b"Serve_Multiplexed_Model_Id",
        b"Serve-Multiplexed-Model-Id",
        b"X-Request-Disconnect-Disabled",
    ],
)
async def test_how_serve_serves_them_is_not_for_callers_to_say(port, name):
    """With one of these, who leaves would still have its images drawn."""
    head = b"GET /headers HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Key: k\r\n"
    answer = await answer_to(port, head + name + b": ?1\r\n\r\n")
    assert b"x-key: k" in answer
    assert b"?1" not in answer


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
