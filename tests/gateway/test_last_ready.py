"""What a proxy says of readiness while no gateway says anything."""

import asyncio
from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware, convert_object_to_asgi_messages

from flux_ray.gateway import proxy_middleware as last_ready
from flux_ray.gateway.proxy_middleware import MAX_AGE_S, LastReady, ProxyAnswers

READY = {"tiers": ["tiny"]}
UNREADY = {"error": {"code": "tier_unavailable"}}


class Gateway:
    """Behind a proxy: says its word, or, where it is gone, nothing until `returns` is set."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.word: tuple[Any, int] = (READY, 200)
        self.error: Exception | None = None
        self.returns = asyncio.Event()
        self.returns.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_asked += 1
        await self.returns.wait()
        if self.error is not None:
            raise self.error
        for message in convert_object_to_asgi_messages(self.word[0], status_code=self.word[1]):
            await send(message)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def client(gateway: Gateway, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(last_ready, "ANSWER_S", 0.05)
    app = ProxyAnswers(LastReady(RequestIdMiddleware(gateway), clock))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
        yield client
    gateway.returns.set()


async def test_a_gateways_word_is_passed_on(client: Any, gateway: Gateway) -> None:
    assert (await client.get("/readyz")).json() == READY
    gateway.word = (UNREADY, 503)
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, UNREADY)


async def test_the_last_word_counts_while_no_gateway_answers(client: Any, gateway: Gateway) -> None:
    first = await client.get("/readyz")
    gateway.returns.clear()
    again = await client.get("/readyz", headers={"x-request-id": "mine"})
    assert (again.status_code, again.json()) == (200, READY)
    assert first.headers["x-request-id"] not in again.headers.values()


async def test_one_question_at_a_time_waits_for_a_gateway(client: Any, gateway: Gateway) -> None:
    await client.get("/readyz")
    gateway.returns.clear()
    for _ in range(5):
        await client.get("/readyz")
    assert gateway.num_asked == 2
    gateway.word = (UNREADY, 503)
    gateway.returns.set()
    assert (await client.get("/readyz")).status_code == 503


@pytest.mark.parametrize("error", [None, RuntimeError("the replica died")])
async def test_serves_words_for_a_dead_gateway_are_no_word(
    client: Any, gateway: Gateway, error: Exception | None
) -> None:
    await client.get("/readyz")
    gateway.word, gateway.error = ("Internal Server Error", 500), error
    assert (await client.get("/readyz")).json() == READY


async def test_a_word_against_it_is_remembered(client: Any, gateway: Gateway) -> None:
    await client.get("/readyz")
    gateway.word = (UNREADY, 503)
    await client.get("/readyz")
    gateway.word = ("Internal Server Error", 500)
    assert (await client.get("/readyz")).status_code == 503


async def test_no_word_counts_for_ever(client: Any, gateway: Gateway, clock: Clock) -> None:
    await client.get("/readyz")
    gateway.word = ("Internal Server Error", 500)
    clock.now_s += MAX_AGE_S + 1
    assert (await client.get("/readyz")).status_code == 503


async def test_without_a_word_a_gateway_is_waited_for(client: Any, gateway: Gateway) -> None:
    gateway.returns.clear()
    asking = asyncio.create_task(client.get("/readyz"))
    await asyncio.sleep(0.2)
    assert not asking.done()
    gateway.returns.set()
    assert (await asking).json() == READY


async def test_nothing_else_is_remembered(client: Any, gateway: Gateway) -> None:
    await client.get("/v1/models")
    gateway.word = ("Internal Server Error", 500)
    assert (await client.get("/v1/models")).status_code == 503
