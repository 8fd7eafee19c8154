"""What keys may have, as their clients hear of it."""

import time
from datetime import UTC, datetime

import httpx
import pytest

from flux_ray.auth.keys import KeyFile, new_key, write_keys
from flux_ray.config.gateway import GatewayArgs
from flux_ray.gateway.api import build_api
from flux_ray.router.ledger.quota_client import QuotaClient
from flux_ray.router.pricing.cost import ReplicaSpec
from flux_ray.router.pricing.cost_model import CostModel
from flux_ray.router.quotas import LimitExceeded, QuotaLedger
from flux_ray.router.router import Router, Terms
from tests.conftest import LIMITS, FakeBill, FakeHandles, FakeTurns

PATH = "/v1/images/generations"
NOW = datetime(2026, 11, 1, tzinfo=UTC)


class Books:
    """The line to books that all gateways share."""

    def __init__(self):
        self.books = QuotaLedger()

    async def enter(self, gateway, quota):
        return self.books.admit(gateway, quota.entry, quota.limits, quota.rows, time.time())

    async def leave(self, gateway, entry, rows):
        self.books.leave(gateway, entry.request_id, entry.tier, rows)

    async def share_usage(self, gateway, report):
        entries, rows, tells_all = report.entries, report.rows, report.tells_all
        return self.books.share(gateway, entries, rows, time.time(), tells_all=tells_all)


class LimitedTurns(FakeTurns):
    """Grants every turn that the books let in, as the ledger does in one message."""

    def __init__(self, books, gateway):
        super().__init__()
        self.books = books
        self.gateway = gateway

    async def take(self, offer, hear=None, quota=None):
        if quota is not None:
            answer = await self.books.enter(self.gateway, quota.request())
            if isinstance(answer, LimitExceeded):
                raise quota.refuse(answer)
            quota.admit(answer)
        return await super().take(offer, hear)


@pytest.fixture
async def ask(tmp_path):
    """`ask(class, gateway=0, **fields)`: of two gateways with their own fakes."""
    classes = {
        "quick": {"requests_per_minute": 2},
        "small": {"megapixels_per_day": 0.04},
        "poor": {"gpu_seconds_per_day": 0.00001},
        "single": {"max_concurrent": 1},
    }
    made = {name: new_key(f"{name}-1", name, NOW) for name in classes}
    path = tmp_path / "keys.yaml"
    write_keys(path, KeyFile(keys=tuple(each.key for each in made.values())))
    args = GatewayArgs.model_validate(
        {"tiers": ["tiny"], "keys_file": path, "key_classes": classes, "limits": LIMITS}
    )
    books, gates, clients = Books(), [], []
    for name in ("g", "h"):
        gates.append(QuotaClient(books, name))
        prices = CostModel({"tiny": ReplicaSpec("cpu", dtype="float32")})
        turns, terms = LimitedTurns(books, name), Terms(request_timeout_s=5)
        router = Router(FakeHandles(), turns, prices, FakeBill(), terms, None, gates[-1])
        transport = httpx.ASGITransport(app=build_api(router, args))
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://gateway"))

    async def ask(key_class, gateway=0, path=PATH, **fields):
        words = {} if "inputs" in fields else {"prompt": "a ring"}
        body = words | {"size": "128x128"} | fields
        headers = {"x-key": made[key_class].secret}
        return await clients[gateway].post(path, json=body, headers=headers)

    yield ask
    for gate, client in zip(gates, clients, strict=True):
        gate.stop()
        await client.aclose()


async def test_a_minute_over_two_gateways(ask):
    assert [(await ask("quick", gateway)).status_code for gateway in (0, 1)] == [200, 200]
    for gateway in (0, 1):
        answer = await ask("quick", gateway)
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert 58 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-ratelimit-limit"] == "2"
        assert answer.headers["x-ratelimit-remaining"] == "0"
        assert answer.headers["x-ratelimit-reset"] == answer.headers["retry-after"]
        assert answer.headers["x-should-retry"] == "true"


async def test_a_day_of_megapixels(ask):
    assert (await ask("small", n=2)).status_code == 200
    answer = await ask("small", 1)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-ratelimit-remaining"] == "0.007232"
    assert int(answer.headers["retry-after"]) <= 86_400
    assert (await ask("small", 1, size="64x64")).status_code == 200, "there is room for that"


async def test_a_stream_hears_it_as_a_plain_answer(ask):
    for _ in range(2):
        assert (await ask("quick", stream=True)).status_code == 200
    assert (await ask("quick", stream=True)).status_code == 429


async def test_what_no_day_has_is_not_to_be_asked_again(ask):
    answer = await ask("poor")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "quota_too_small")
    assert "retry-after" not in answer.headers


LIMIT_HEADERS = tuple(f"x-ratelimit-{name}" for name in ("limit", "remaining", "reset"))


@pytest.mark.parametrize(
    ("path", "fields"),
    [(PATH, {}), (PATH, {"stream": True}), ("/models/tiny", {"inputs": "a ring"})],
)
async def test_images_tell_what_is_left(ask, path, fields):
    for left in ("1", "0"):
        answer = await ask("quick", path=path, **fields)
        assert answer.status_code == 200, answer.text
        limit, remaining, reset = (answer.headers[name] for name in LIMIT_HEADERS)
        assert (limit, remaining) == ("2", left)
        assert 58 <= int(reset) <= 60


async def test_images_tell_what_is_left_of_a_day(ask):
    answer = await ask("small")
    assert answer.headers["x-ratelimit-limit"] == "0.04"
    assert answer.headers["x-ratelimit-remaining"] == "0.023616"
    assert 1 <= int(answer.headers["x-ratelimit-reset"]) <= 86_400


async def test_what_is_had_at_once_is_over_by_then(ask):
    answer = await ask("single")
    assert answer.status_code == 200
    assert not [name for name in LIMIT_HEADERS if name in answer.headers]
