"""Slow bodies are ended, and hold nobody else's place."""

import asyncio
import gzip
import json
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

import httpx
import pytest
from pydantic import ValidationError

from flux_ray.auth.keys import KeyFile, new_key, write_keys
from flux_ray.config.gateway import GatewayArgs, Uploads
from flux_ray.gateway.api import build_api
from flux_ray.gateway.intake import BODY as AT_HAND
from flux_ray.gateway.intake import BodyAtHand, address_of, may_have_body
from tests.conftest import LIMITS
from tests.gateway.fake_desk import FakeDesk

GENERATIONS = "/v1/images/generations"
JSON = {"content-type": "application/json"}
BODY = json.dumps({"prompt": "a ring", "seed": 1}).encode()
NOW = datetime(2026, 11, 1, tzinfo=UTC)
ALICE, BOB = new_key("alice", "two", NOW), new_key("bob", None, NOW)
# Nothing is too slow for them.
PATIENT = Uploads(first_byte_s=600, grace_s=600, max_s=600, max_per_caller=3, wait_s=0.02)


def args_of(job_args, uploads=PATIENT, **fields) -> GatewayArgs:
    given = {"max_ongoing_requests": 16, "limits": LIMITS, "uploads": uploads}
    jobs = {"jobs": job_args, "public_url": "http://gateway"}
    return GatewayArgs(tiers=("tiny",), **{**given, **jobs, **fields})


@pytest.fixture
def client_of(router, job_args):
    """`client_of(address="8.8.8.8", **args)`: of a gateway, or of `api`, seen at that address."""

    def client(address="8.8.8.8", api=None, uploads=PATIENT, **fields) -> httpx.AsyncClient:
        api = api or build_api(router, args_of(job_args, uploads, **fields), job_service=FakeDesk())
        transport = httpx.ASGITransport(app=api, raise_app_exceptions=False, client=(address, 1))
        return httpx.AsyncClient(transport=transport, base_url="http://gateway")

    return client


@asynccontextmanager
async def uploading(client, path=GENERATIONS, headers=JSON, start=b""):
    """A body of which, within, nothing but its start comes. Yields an event that ends it."""
    is_read, may_end = asyncio.Event(), asyncio.Event()

    async def body():
        yield start
        is_read.set()
        await may_end.wait()
        yield BODY

    asking = asyncio.create_task(client.post(path, content=body(), headers=headers))
    await asyncio.wait({asking, reading := asyncio.create_task(is_read.wait())}, **FIRST)
    reading.cancel()
    try:
        yield asking
    finally:
        may_end.set()
        await asking


FIRST = {"return_when": asyncio.FIRST_COMPLETED}


@pytest.mark.parametrize(
    ("num_bytes", "due_s"), [(0, 5), (1, 10.00005), (20_000, 11), (1_000_000, 60), (10**9, 120)]
)
def test_a_body_has_to_begin_and_to_go_on(num_bytes, due_s):
    assert Uploads().due_s(num_bytes) == pytest.approx(due_s)


@pytest.mark.parametrize(
    ("uploads", "start", "words"),
    [
        (Uploads(first_byte_s=0.05), b"", "nothing of the body came within 0.05 s"),
        (Uploads(grace_s=0.05), b" ", "the body came too slowly: 1 bytes"),
        (Uploads(max_s=0.05), b" ", "the body took longer than 0.05 s"),
    ],
)
@pytest.mark.parametrize("path", [GENERATIONS, "/v1/tiny", "/models/tiny"])
async def test_a_slow_body_is_ended_in_the_words_of_its_dialect(
    client_of, handles, uploads, start, words, path
):
    async def body():
        yield start
        await asyncio.Event().wait()

    async with client_of(uploads=uploads) as client:
        answer = await client.post(path, content=body(), headers=JSON)
    assert (answer.status_code, handles.requests) == (408, [])
    assert words in answer.text


async def test_a_packed_body_is_timed_as_it_comes(client_of):
    """A few bytes a second would be many, unpacked."""
    packed = gzip.compress(b" " * 900_000)

    async def body():
        for byte in packed:
            yield bytes([byte])
            await asyncio.sleep(0.001)

    async with client_of(uploads=Uploads(grace_s=0.1)) as client:
        headers = JSON | {"content-encoding": "gzip"}
        answer = await client.post(GENERATIONS, content=body(), headers=headers)
    assert answer.status_code == 408


async def test_a_stall_is_forgiven(client_of):
    async def body():
        yield BODY[:5]
        await asyncio.sleep(0.2)
        yield BODY[5:]

    async with client_of(uploads=Uploads(grace_s=60)) as client:
        answer = await client.post(GENERATIONS, content=body(), headers=JSON)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "message_of"),
    [
        (GENERATIONS, lambda body: body["error"]["message"]),
        ("/v1/tiny", lambda body: body["detail"]),
        ("/models/tiny", lambda body: body["error"]),
    ],
)
async def test_an_address_has_its_share_and_others_have_theirs(client_of, path, message_of):
    """Who finds none is told before its body is read."""
    api = client_of()._transport.app
    async with client_of(api=api) as client, client_of("9.9.9.9", api) as other:
        async with AsyncExitStack() as slow:
            for _ in range(3):
                await slow.enter_async_context(uploading(client))
            num_read = 0

            async def body():
                nonlocal num_read
                num_read += 1
                yield BODY

            answer = await client.post(path, content=body(), headers=JSON)
            assert (answer.status_code, num_read) == (429, 0)
            assert answer.headers["retry-after"] == "1"
            assert "3 bodies of yours" in message_of(answer.json())
            plain = await other.post(GENERATIONS, content=BODY, headers=JSON)
            assert plain.status_code == 200
        assert (await client.post(GENERATIONS, content=BODY, headers=JSON)).status_code == 200


async def test_a_key_has_its_share_from_wherever_it_comes(client_of, tmp_path):
    """Of its class's `max_concurrent` where that is smaller; and others' stay theirs."""
    path = tmp_path / "keys.yaml"
    write_keys(path, KeyFile(keys=(ALICE.key, BOB.key)))
    api = client_of(keys_file=path, key_classes={"two": {"max_concurrent": 2}})._transport.app
    alice, bob = (JSON | {"x-key": each.secret} for each in (ALICE, BOB))
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(client_of(f"8.8.8.{number}", api))
            for number in range(3)
        ]
        for client in clients[:2]:
            await stack.enter_async_context(uploading(client, headers=alice))
        answer = await clients[2].post(GENERATIONS, content=BODY, headers=alice)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert (await clients[0].post(GENERATIONS, content=BODY, headers=bob)).status_code == 200


async def test_a_burst_of_small_bodies_is_read_in_turns(client_of):
    async with client_of(uploads=PATIENT.model_copy(update={"wait_s": 600})) as client:
        answers = await asyncio.gather(
            *(client.post(GENERATIONS, content=BODY, headers=JSON) for _ in range(7))
        )
    assert {answer.status_code for answer in answers} == {200}


@pytest.fixture
async def full(client_of, turns):
    """A gateway all of whose places are taken by requests that wait for their image."""
    may_generate = asyncio.Event()

    async def take(offer, on_event=None, quota=None) -> str:
        await may_generate.wait()
        return "replica"

    turns.take = take
    # More than all places for bodies: theirs are read.
    uploads = PATIENT.model_copy(update={"max_per_caller": 7, "wait_s": 600})
    async with client_of(uploads=uploads) as client:
        asking = [
            asyncio.create_task(client.post(GENERATIONS, content=BODY, headers=JSON))
            for _ in range(7)
        ]
        await asyncio.sleep(0.05)
        asking += [
            asyncio.create_task(client.post(GENERATIONS, content=BODY, headers=JSON))
            for _ in range(15 - 7)
        ]
        await asyncio.sleep(0.05)
        yield client
        may_generate.set()
        answers = await asyncio.gather(*asking)
    assert {answer.status_code for answer in answers} == {200}


@pytest.mark.parametrize("path", [GENERATIONS, "/v1/tiny", "/models/tiny", "/v1/models"])
async def test_who_finds_the_gateway_full_is_told_so_and_probes_are_not(full, path):
    for probe in ("/health", "/readyz"):
        assert (await full.get(probe)).status_code == 200
    answer = await full.post(path, content=BODY, headers=JSON)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["x-should-retry"] == "true"
    assert "as many requests in hand as it may" in answer.text


async def test_slow_bodies_of_many_leave_places_for_all_others(client_of):
    api = client_of()._transport.app
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(client_of(f"8.8.8.{number}", api))
            for number in range(8)
        ]
        for client in clients[:7]:
            await stack.enter_async_context(uploading(client))
        refused = await clients[7].post(GENERATIONS, content=BODY, headers=JSON)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "gateway_full")
        for path in ("/health", "/readyz", "/v1/models", "/v1/get_result?id=x", "/openapi.json"):
            answer = await clients[7].get(path)
            assert answer.status_code == (404 if "id" in path else 200)


def test_the_numbers_follow_from_each_other():
    args = GatewayArgs(tiers=("tiny",))
    assert (args.max_ongoing_requests, args.max_requests, args.max_bodies) == (256, 240, 120)
    for number in range(4, 600):
        args = GatewayArgs(tiers=("tiny",), max_ongoing_requests=number)
        assert 1 <= args.max_bodies < args.max_requests < args.max_ongoing_requests
    with pytest.raises(ValidationError, match=r"uploads\.max_at_once 15 is not below 15"):
        GatewayArgs(tiers=("tiny",), max_ongoing_requests=16, uploads=Uploads(max_at_once=15))


@pytest.mark.parametrize(
    ("method", "headers", "may_have"),
    [
        ("GET", {}, False),
        ("POST", {}, True),
        ("POST", {"content-length": "0"}, False),
        ("POST", {"content-length": "00"}, False),
        ("POST", {"content-length": "10"}, True),
        ("GET", {"content-length": "10"}, True),
        ("GET", {"transfer-encoding": "chunked"}, True),
        ("POST", {"content-length": "0", "transfer-encoding": "chunked"}, True),
    ],
)
def test_only_what_may_have_bytes_takes_a_place(method, headers, may_have):
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert may_have_body({"type": "http", "method": method, "headers": raw}) is may_have


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("8.8.8.8", 1), "8.8.8.8"),
        (("2001:db8::1:2:3:4", 1), "2001:db8::/64"),
        (("2001:db8::5", 1), "2001:db8::/64"),
        (("::ffff:8.8.8.8", 1), "::ffff:8.8.8.8"),
        (("a socket", 1), "a socket"),
        (None, ""),
    ],
)
def test_who_has_many_addresses_of_a_network_is_one(client, address):
    assert address_of({"type": "http", "client": client}) == address
    assert address_of({"type": "http"}) == ""


async def test_a_body_that_came_with_its_request_is_not_waited_for(router, job_args):
    """It comes once more, which is no second body."""
    api, sent = build_api(router, args_of(job_args), job_service=FakeDesk()), []

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "client": ("8.8.8.8", 1)}
    await asyncio.wait_for(api({**scope, AT_HAND: BODY}, receive, send), 60)
    assert sent[0]["status"] == 200

    coming = iter([{"type": "http.request", "body": BODY}, {"type": "http.disconnect"}])

    async def receive_again():
        return next(coming)

    body = BodyAtHand(BODY, receive_again)
    assert [(await body.receive())["type"] for _ in range(2)] == ["http.request", "http.disconnect"]
