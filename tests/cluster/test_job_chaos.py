"""Jobs on the real cluster while its gateways, leaders and ranks are killed: none is lost."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks.webhooks import Webhook

from tests.cluster.conftest import PATIENCE_S, Replica, more_gateways
from tests.cluster.storm import PROMPT, Generate
from tests.jobs.servers import Postgres
from tests.jobs.waiting import wait_until
from tests.webhook_receiver import Post, WebhookReceiver, receiving

NUM_SEEDS = 10
JOBS_PER_KILL = 10
NUM_SUBMITTERS = 4
LIMIT_S = 1200
PREFIX = "/with-jobs"
APP = "gateways-with-jobs"
SECRET = "whsec_c3Rvcm0="
# Killed in turns. The tier has one leader and one rank, and there are two gateways.
VICTIMS = ("gateway", "gateway", "leader", "rank")


# Each job takes seconds. tests/jobs/test_chaos.py, without a cluster, always has both databases.
@pytest.fixture(
    params=[
        pytest.param(60, marks=pytest.mark.slow),
        pytest.param(200, marks=pytest.mark.drill),
    ]
)
def num_jobs(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.drill)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/jobs.sqlite3"
        return
    server = Postgres()
    yield server.new_database()
    server.close()


@pytest.fixture
async def receiver() -> Any:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def gateways(
    address: str, config: dict[str, Any], database: str, receiver: WebhookReceiver, tmp_path: Path
) -> Iterator[str]:
    """Deploy two more gateways with a job database of their own, and yield their URL."""
    url = f"{address}{PREFIX}"
    args = {
        "tiers": ["tiny"],
        "card": "cpu",
        "num_replicas": 2,
        "public_url": url,
        "webhooks": {"schemes": ["http"], "ports": [receiver.port], "networks": ["127.0.0.0/8"]},
        "jobs": {
            "database": database,
            "results": f"{tmp_path}/results",
            "lease_s": 3,
            "max_running": 4,
            "max_lost": 50,
            "webhook_retries_s": [0.5] * 100,
        },
    }
    with more_gateways(config, url, APP, args):
        yield url


async def insist(ask: Callable[[], Any]) -> dict[str, Any]:
    """Ask until there is an answer, as a client does after no answer or one that says to retry."""
    while True:
        try:
            answer = await ask()
        except httpx.TransportError:
            answer = None
        if answer is not None and answer.status_code == 200:
            return answer.json()
        assert answer is None or answer.status_code in (404, 429, 500, 502, 503, 504), answer.text
        await asyncio.sleep(0.2)


class Clients:
    """Clients that submit jobs, and ask for them until they are done."""

    def __init__(self, url: str, receiver: WebhookReceiver) -> None:
        self.url = url
        self.hook = f"http://127.0.0.1:{receiver.port}/moody"
        # No limit of connections, so that no client waits for another one's.
        self.http = httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=None))
        self.results: dict[int, dict[str, Any]] = {}

    async def submit(self, number: int) -> str:
        body = {
            "prompt": PROMPT,
            "seed": number % NUM_SEEDS,
            "width": 64,
            "height": 64,
            "output_format": "png",
            "webhook_url": self.hook,
            "webhook_secret": SECRET,
        }
        headers = {"x-key": "k", "idempotency-key": f"job-{number}"}
        told = await insist(
            lambda: self.http.post(f"{self.url}/v1/tiny", json=body, headers=headers)
        )
        return str(told["polling_url"])

    async def follow(self, number: int) -> None:
        """Ask for a job until it has ended."""
        polling_url = await self.submit(number)
        while True:
            told = await insist(lambda: self.http.get(polling_url, headers={"x-key": "k"}))
            if told["status"] != "Pending":
                self.results[number] = told
                return
            await asyncio.sleep(1.0)

    async def image_of(self, number: int) -> bytes:
        answer = await self.http.get(self.results[number]["result"]["sample"])
        assert answer.status_code == 200
        return answer.content


def kill(victim: str, replicas: Callable[..., list[Replica]]) -> None:
    """Kill one process of that kind, if there is one at the moment."""
    found = replicas(APP, "gateway") if victim == "gateway" else replicas("tiny")
    if not found:
        return
    chosen = random.choice(found)
    process = chosen.ranks[0] if victim == "rank" and chosen.ranks else chosen.leader
    process.kill()


async def all_told(receiver: WebhookReceiver, num_jobs: int) -> bool:
    return len(receiver.taken) >= num_jobs


async def test_every_job_ends_ready_whatever_is_killed(
    gateways: str,
    receiver: WebhookReceiver,
    replicas: Callable[..., list[Replica]],
    generate: Generate,
    num_jobs: int,
) -> None:
    expected = [generate(PROMPT, seed=seed, size="64x64")[0] for seed in range(NUM_SEEDS)]
    clients, kills, began_s = Clients(gateways, receiver), [], time.monotonic()
    async with clients.http, asyncio.timeout(LIMIT_S):
        following = asyncio.gather(*map(clients.follow, range(num_jobs)))
        num_checked = 0
        while not following.done():
            await asyncio.wait({following}, timeout=0.5)
            num_checked += check_posts(receiver.posts[num_checked:])
            if len(clients.results) >= JOBS_PER_KILL * (len(kills) + 1):
                kills.append(VICTIMS[len(kills) % len(VICTIMS)])
                await asyncio.to_thread(kill, kills[-1], replicas)
        await following
        await wait_until(lambda: all_told(receiver, num_jobs), timeout_s=PATIENCE_S)
        for number, told in clients.results.items():
            assert told["status"] == "Ready", told
            assert await clients.image_of(number) == expected[number % NUM_SEEDS]
    check_posts(receiver.posts[num_checked:])
    job_ids = {told["id"] for told in clients.results.values()}
    assert len(job_ids) == num_jobs, "a job for each idempotency key"
    assert receiver.taken.keys() == job_ids, "each was told of"
    assert set(kills) == set(VICTIMS)
    took_s = time.monotonic() - began_s
    print(f"{num_jobs} ready, {len(kills)} kills, {len(receiver.posts)} posts, {took_s:.0f} s")


def check_posts(posts: Sequence[Post]) -> int:
    """Check the signatures of the webhooks that came, and return their number.

    Call this soon after they came: a signature is valid for five minutes, and the whole test may
    take longer.
    """
    for post in posts:
        message = Webhook(SECRET).verify(post.body, post.headers)
        assert message == json.loads(post.body)
        assert (message["status"], message["id"]) == ("Ready", post.headers["webhook-id"])
    return len(posts)
