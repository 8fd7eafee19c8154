"""What a proxy passes on at once, what later, and what never."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ray.gateway import proxy_middleware as begun_bodies
from flux_ray.gateway.http import HEADER
from flux_ray.gateway.intake import BODY
from flux_ray.gateway.proxy_middleware import BEGINNING_BYTES, BegunBodies

PATH = "/v1/images/generations"
# However slow the machine is: what does not come by then does not come.
PATIENCE_S = 60
NEVER: list[dict[str, Any]] = []


class Gateway:
    """Behind the proxy: notes when it hears of a request, and what body it reads."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[float] = asyncio.Queue()
        self.bodies: list[bytes] = []
        self.scope: dict[str, Any] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        self.heard.put_nowait(asyncio.get_running_loop().time())
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def scope_of(client: str = "10.0.0.1", method: str = "POST") -> dict[str, Any]:
    headers = [(b"transfer-encoding", b"chunked")] if method == "POST" else []
    headers.append((HEADER.encode(), b"an-id"))
    return {
        "type": "http",
        "method": method,
        "path": PATH,
        "headers": headers,
        "client": (client, 1),
    }


async def call(
    app: BegunBodies, messages: list[dict[str, Any]], client: str = "10.0.0.1", method: str = "POST"
) -> list[dict[str, Any]]:
    """Return what is answered to one whose client sends these messages, and then nothing."""
    coming, sent = iter(messages), []

    async def receive() -> dict[str, Any]:
        message = next(coming, None)
        return message if message is not None else await asyncio.Event().wait()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope_of(client, method), receive, send)
    return sent


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def app(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> BegunBodies:
    """With moments so short that a test may wait for them."""
    monkeypatch.setattr(begun_bodies, "MOMENT_S", 0.02)
    return BegunBodies(gateway)


@given(st.lists(st.binary(max_size=3 * BEGINNING_BYTES // 2), min_size=1, max_size=6))
def test_a_body_arrives_as_it_was_sent(pieces: list[bytes]) -> None:
    gateway = Gateway()
    messages = [part(each) for each in pieces[:-1]] + [part(pieces[-1], more=False)]
    asyncio.run(call(BegunBodies(gateway), messages))
    assert gateway.bodies == [b"".join(pieces)]


async def test_a_short_body_comes_with_its_request(app: BegunBodies, gateway: Gateway) -> None:
    """A gateway does not have to ask for it; other applications do."""
    await call(app, [part(b"a "), part(b"ring", more=False)])
    assert gateway.scope[BODY] == b"a ring"
    assert gateway.bodies == [b"a ring"]


async def test_what_has_no_body_is_passed_on_at_once(app: BegunBodies, gateway: Gateway) -> None:
    running = asyncio.create_task(call(app, NEVER, method="GET"))
    await asyncio.sleep(0)
    assert gateway.heard.qsize() == 1
    running.cancel()


async def test_a_large_body_is_passed_on_before_its_end(app: BegunBodies, gateway: Gateway) -> None:
    running = asyncio.create_task(call(app, [part(bytes(BEGINNING_BYTES))]))
    await asyncio.sleep(0)
    assert gateway.heard.qsize() == 1
    running.cancel()


async def test_bodies_that_do_not_come_are_passed_on_one_by_one(
    app: BegunBodies, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(begun_bodies, "TURN_EVERY_S", 0.05)
    began_s = asyncio.get_running_loop().time()
    late = [asyncio.create_task(call(app, [part(b"a")])) for _ in range(4)]
    for number in range(1, 5):
        assert await gateway.heard.get() - began_s >= number * 0.05
    for each in late:
        each.cancel()


async def test_nobody_else_waits_for_those(
    app: BegunBodies, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not who sends, from the same address, and not the slow of another one."""
    monkeypatch.setattr(begun_bodies, "TURN_EVERY_S", 10.0)
    late = [asyncio.create_task(call(app, NEVER)) for _ in range(2)]
    await asyncio.sleep(0.05)
    await call(app, [part(b"a ring", more=False)])
    assert gateway.bodies == [b"a ring"]
    monkeypatch.setattr(begun_bodies, "TURN_EVERY_S", 0.0)
    other = asyncio.create_task(call(app, NEVER, client="10.0.0.2"))
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(2):
            await gateway.heard.get()
    for each in (*late, other):
        each.cancel()


async def test_too_many_of_one_address_are_refused(
    app: BegunBodies, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(begun_bodies, "TURN_EVERY_S", 20.0)
    first = asyncio.create_task(call(app, NEVER))
    await asyncio.sleep(0.03)
    start, body = await call(app, NEVER)
    assert start["status"] == 429
    assert (HEADER.encode(), b"an-id") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "rate_limit_exceeded"
    assert dict(start["headers"])[b"x-ratelimit-limit"] != b"0"
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert app._turns == {}, "who left gave his turn back"


async def test_a_client_that_left_costs_no_gateway_anything(
    app: BegunBodies, gateway: Gateway
) -> None:
    await call(app, [part(b"a"), {"type": "http.disconnect"}])
    assert gateway.heard.empty()
