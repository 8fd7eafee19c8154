"""Keys and their limits, counted over two real gateways, even if the ledger dies."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from flux_ray.auth.keys import NewKey, change_keys, new_key, with_key, without_key
from tests.cluster.conftest import PATIENCE_S, more_gateways, wait_until
from tests.cluster.storm import PROMPT

NOW = datetime(2026, 11, 1, tzinfo=UTC)
PREFIX = "/with-keys"
CLASSES = {
    "quick": {"requests_per_minute": 4},
    "narrow": {"max_concurrent": 2},
    "small": {"megapixels_per_day": 0.02},
}


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.yaml"


@pytest.fixture(scope="module")
def keys(keys_file: Path) -> dict[str, NewKey]:
    """Return a new key of each class."""
    made = {name: new_key(f"{name}-1", name, NOW) for name in CLASSES}
    for each in made.values():
        change_keys(keys_file, lambda file, each=each: with_key(file, each.key))
    return made


@pytest.fixture(scope="module")
def gateways(
    address: str, config: dict[str, Any], keys_file: Path, keys: dict[str, NewKey]
) -> Iterator[str]:
    """Deploy two more gateways behind a prefix of their own, and yield their URL."""
    url = f"{address}{PREFIX}"
    args = {"tiers": ["tiny"], "card": "cpu", "num_replicas": 2, "key_classes": CLASSES}
    with more_gateways(config, url, "gateways-with-keys", args | {"keys_file": str(keys_file)}):
        yield url


def ask(url: str, secret: str, **fields: object) -> httpx.Response:
    body = {"prompt": PROMPT, "size": "128x128", **fields}
    return httpx.post(
        f"{url}/v1/images/generations", json=body, headers={"x-key": secret}, timeout=PATIENCE_S
    )


def statuses(url: str, secret: str, number: int) -> Counter[int]:
    with ThreadPoolExecutor(number) as clients:
        answers = clients.map(lambda _: ask(url, secret).status_code, range(number))
        return Counter(answers)


def test_two_gateways_count_as_one(gateways: str, keys: dict[str, NewKey]) -> None:
    assert httpx.get(f"{gateways}/health").status_code == 200
    assert httpx.get(f"{gateways}/v1/models").status_code == 401
    assert statuses(gateways, keys["quick"].secret, 12) == {200: 4, 429: 8}
    assert statuses(gateways, keys["narrow"].secret, 8)[200] >= 2
    for _ in range(6):
        # The key may ask again as soon as it has its answer, at whichever gateway.
        assert statuses(gateways, keys["narrow"].secret, 2) == {200: 2}


def test_a_lost_ledger_forgets_no_day(gateways: str, keys: dict[str, NewKey]) -> None:
    import ray

    from flux_ray.router.ledger.remote import start_ledger

    answer = ask(gateways, keys["small"].secret)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-limit"] == "0.02"
    assert answer.headers["x-ratelimit-remaining"] == "0.003616"
    assert ask(gateways, keys["small"].secret).status_code == 429
    # By then both gateways know what the other counted: each reports to the ledger every 2 seconds.
    time.sleep(8)
    ray.kill(start_ledger(), no_restart=False)
    for _ in range(4):
        answer = ask(gateways, keys["small"].secret)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")


def test_keys_change_without_a_restart(
    gateways: str, keys: dict[str, NewKey], keys_file: Path
) -> None:
    old, new = keys["narrow"], new_key("narrow-1", "narrow", NOW)
    change_keys(keys_file, lambda file: with_key(file, new.key))
    change_keys(keys_file, lambda file: without_key(file, old.key.prefix, NOW))
    wait_until(
        lambda: all(ask(gateways, old.secret).status_code == 401 for _ in range(8)),
        what="gateways that have read the keys again",
    )
    for _ in range(4):
        assert ask(gateways, old.secret).status_code == 401
        assert ask(gateways, new.secret).status_code == 200
