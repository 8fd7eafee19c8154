"""Bodies and images of all dialects are in the budget while they are in memory, and no longer."""

import asyncio
import base64
import gc
import json
import time
from collections.abc import Iterator

import httpx
import pytest

from flux_ray.config.gateway import GatewayArgs, Limits, Uploads
from flux_ray.gateway.api import build_api
from flux_ray.gateway.memory_budget import MEMORY
from tests.gateway.fake_desk import FakeDesk

LIMITS = Limits(max_body_bytes=1_000_000, max_held_bytes=2_000_000, max_image_pixels=20_000)
JSON = {"content-type": "application/json"}
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture
def gateway_args(job_args) -> GatewayArgs:
    return GatewayArgs(tiers=("tiny",), limits=LIMITS, jobs=job_args, public_url="http://gateway")


@pytest.fixture
def api(router, gateway_args):
    return build_api(router, gateway_args, job_service=FakeDesk())


@pytest.fixture(autouse=True)
def in_hand(handles) -> Iterator[None]:
    """Each test leaves the budget as it found it."""
    # What tests of other files left behind would be in the way.
    gc.collect()
    before = MEMORY.num_bytes
    yield
    # A replica of fakes remembers what it was sent.
    handles.requests.clear()
    until_s = time.monotonic() + 10
    while MEMORY.num_bytes != before and time.monotonic() < until_s:
        # An error's traceback holds what it was about until it is collected; a thread that has just
        # decoded an image holds it until it runs again.
        gc.collect()
        time.sleep(0.01)
    assert MEMORY.num_bytes == before
    assert MEMORY.num_work_bytes == 0


@pytest.fixture
def full() -> Iterator[None]:
    share = MEMORY.share(LIMITS.max_kept_bytes)
    share.grow(LIMITS.max_kept_bytes - MEMORY.num_bytes - 10)
    yield
    share.release()


BODY = json.dumps({"prompt": "a ring", "seed": 1}).encode()


@pytest.mark.parametrize(
    ("path", "message_of"),
    [
        (GENERATIONS, lambda body: body["error"]["message"]),
        ("/v1/tiny", lambda body: body["detail"]),
        ("/models/tiny", lambda body: body["error"]),
    ],
)
async def test_who_finds_no_room_is_told_to_come_back_in_its_dialect(
    client, full, path, message_of
):
    body = b'{"inputs": "a ring"}' if path.startswith("/models") else BODY
    answer = await client.post(path, content=body, headers=JSON)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert "in hand" in str(message_of(answer.json()))


async def test_a_form_finds_no_room_either(client, full, make_image):
    files = {"image": ("a.png", make_image(), "image/png")}
    answer = await client.post(EDITS, data={"prompt": "a ring"}, files=files)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "overloaded"


async def test_probes_never_wait_for_room(client, full):
    for path in ("/health", "/readyz", "/v1/models"):
        assert (await client.get(path)).status_code == 200


async def test_a_body_that_grows_beyond_the_room_is_refused_when_it_does(client):
    num_sent = 0
    share = MEMORY.share(LIMITS.max_kept_bytes)
    share.grow(LIMITS.max_kept_bytes - MEMORY.num_bytes - 200_000)

    async def chunks():
        nonlocal num_sent
        for _ in range(9):
            num_sent += 1
            yield b" " * 40_000

    answer = await client.post(GENERATIONS, content=chunks(), headers=JSON)
    share.release()
    assert answer.status_code == 429
    # Each is in memory twice: the third one is too much.
    assert num_sent == 3


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"prompt": ""}', b'{"prompt": "a", "image": "!!!!"}', b"\xff" * 5000]
)
@pytest.mark.parametrize("path", [GENERATIONS, EDITS, "/v1/tiny", "/models/tiny", "/nowhere"])
async def test_mistakes_leave_nothing_in_the_budget(client, path, body):
    assert 400 <= (await client.post(path, content=body, headers=JSON)).status_code < 500


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(api):
    seen = []

    async def receive():
        if not seen:
            seen.append(MEMORY.num_bytes)
            return {"type": "http.request", "body": b" " * 1000, "more_body": True}
        seen.append(MEMORY.num_bytes)
        return {"type": "http.disconnect"}

    async def send(message) -> None:
        pass

    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": GENERATIONS,
        "raw_path": GENERATIONS.encode(),
        "query_string": b"",
        "headers": headers,
    }
    await api(scope, receive, send)
    assert seen[1] - seen[0] == 2000


async def test_a_slow_body_leaves_nothing(router, gateway_args):
    args = gateway_args.model_copy(update={"uploads": Uploads(max_s=0.05)})
    api = build_api(router, args, job_service=FakeDesk())

    async def body():
        yield b'{"prompt":'
        await asyncio.Event().wait()

    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.post(GENERATIONS, content=body(), headers=JSON)
    assert answer.status_code == 408


@pytest.mark.parametrize("way", ["json", "form", "hugging face"])
async def test_while_it_is_generated_only_the_pixels_are_held(
    client, turns, router, make_image, way
):
    """Not the body, nor the texts in it: an edit may wait for minutes."""
    held, before = [], MEMORY.num_bytes
    taking = router.queue.take

    async def take(offer, on_event=None, quota=None):
        held.append(MEMORY.num_bytes - before)
        return await taking(offer)

    router.queue.take = take
    data = make_image(96, 80)
    text = base64.b64encode(data).decode()
    if way == "json":
        answer = await client.post(EDITS, json={"prompt": "a ring", "image": text})
    elif way == "form":
        files = {"image": ("a.png", data, "image/png")}
        answer = await client.post(EDITS, data={"prompt": "a ring"}, files=files)
    else:
        body = {"inputs": text, "parameters": {"prompt": "a ring"}}
        answer = await client.post("/models/tiny", json=body)
    assert answer.status_code == 200, answer.text
    assert held == [96 * 80 * 3]


async def test_a_client_that_leaves_while_it_waits_leaves_nothing(api, router, make_image):
    is_waiting = asyncio.Event()

    async def take(offer, on_event=None, quota=None) -> str:
        is_waiting.set()
        await asyncio.Event().wait()

    router.queue.take = take
    text = base64.b64encode(make_image()).decode()
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        body = {"prompt": "a ring", "image": text}
        asking = asyncio.create_task(client.post(EDITS, json=body))
        waiting = asyncio.create_task(is_waiting.wait())
        await asyncio.wait({asking, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert not asking.done(), asking.result().text
        asking.cancel()
        await asyncio.wait({asking})
