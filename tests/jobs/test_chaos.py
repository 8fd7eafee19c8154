"""Jobs in a storm: gateways are killed at random, and every job ends once and is told of."""

import asyncio
import json
import random
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from sqlalchemy import text
from standardwebhooks import Webhook

from flux_ray.jobs.database import Database
from flux_ray.jobs.images import Results
from flux_ray.jobs.store import Store, job_of
from flux_ray.jobs.table import JOBS
from flux_ray.jobs.webhooks import WebhookOutbox
from tests.jobs.mortal_gateway import LEASE_S, SECRET, offer_for
from tests.jobs.painter import image_for
from tests.jobs.waiting import wait_until
from tests.webhook_receiver import WebhookReceiver, receiving

ROOT = Path(__file__).parents[2]
NUM_JOBS = 200
NUM_GATEWAYS = 4
NUM_KILLS = 24
# The storm keeps step with the work, however slow the machine: the last kill comes at job 144.
JOBS_PER_KILL = 6
MAX_CALM_S = 0.5

# The database itself notes every change of a job that has ended or ends; its webhook may change.
OF = "status, attempt, claimable_at_s, finished_at_s, result, failure"
NOTE = "INSERT INTO ends VALUES (NEW.job_id, NEW.status)"
AUDIT = {
    "sqlite": [
        "CREATE TABLE ends (job_id TEXT, status TEXT)",
        f"CREATE TRIGGER note AFTER UPDATE OF {OF} ON flux_jobs WHEN NEW.finished_at_s IS NOT NULL"
        f" BEGIN {NOTE}; END",
    ],
    "postgresql": [
        "CREATE TABLE ends (job_id TEXT, status TEXT)",
        "CREATE FUNCTION note_end() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN {NOTE}; RETURN NULL; END $$",
        f"CREATE TRIGGER note AFTER UPDATE OF {OF} ON flux_jobs FOR EACH ROW"
        " WHEN (NEW.finished_at_s IS NOT NULL) EXECUTE FUNCTION note_end()",
    ],
}


class Gateways:
    """So many processes, whichever of them are killed."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._arguments = arguments
        self._log = log
        self._processes = [self._start() for _ in range(NUM_GATEWAYS)]

    def _start(self) -> subprocess.Popen:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "tests.jobs.mortal_gateway", *self._arguments]
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def kill_one(self) -> None:
        """And start another in its place."""
        number = random.randrange(NUM_GATEWAYS)
        assert self._processes[number].poll() is None, self._log.read_text()[-3000:]
        self._kill(number)
        self._processes[number] = self._start()

    def _kill(self, number: int) -> None:
        self._processes[number].kill()
        self._processes[number].wait()

    def close(self) -> None:
        for number in range(NUM_GATEWAYS):
            self._kill(number)


def s3_bucket(s3) -> str:
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", endpoint_url=s3.url, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="chaos")
    client.close()
    return "s3://chaos/results"


@pytest.fixture
def results_place(database_url, request, tmp_path) -> tuple[str, dict[str, str]]:
    """With a file a folder, with a server S3: as one would deploy them."""
    if database_url.startswith("sqlite"):
        return str(tmp_path / "results"), {}
    s3 = request.getfixturevalue("s3")
    return s3_bucket(s3), s3.options


@pytest.mark.slow
async def test_jobs_outlive_their_gateways(database_url, results_place, tmp_path):
    database = Database(database_url)
    await database.create()
    async with database.connect() as connection:
        for statement in AUDIT[database_url.split(":")[0]]:
            await connection.exec_driver_sql(statement)
    store, results = Store(database, LEASE_S, keep_s=3600), Results(*results_place)
    begun_s = time.monotonic()
    arguments = [database_url, results_place[0], json.dumps(results_place[1]), str(NUM_JOBS)]
    async with receiving() as receiver:
        gateways = Gateways([*arguments, str(receiver.port)], tmp_path / "gateways.log")
        try:
            await storm(database, gateways)
        finally:
            gateways.close()
    num_lost = await check_all(database, store, results)
    told = await check_told(database, receiver)
    took_s = time.monotonic() - begun_s
    print(f"{NUM_JOBS} ready, {NUM_KILLS} kills, {num_lost} jobs lost and redone, {took_s:.0f} s")
    print(told)
    await database.close()


async def storm(database: Database, gateways: Gateways) -> None:
    for number in range(NUM_KILLS):
        await wait_for_ends(database, number * JOBS_PER_KILL)
        await asyncio.sleep(random.uniform(0, MAX_CALM_S))
        gateways.kill_one()
    await wait_for_ends(database, NUM_JOBS)

    async def are_told() -> bool:
        query = "SELECT count(*) FROM flux_jobs WHERE webhook_state = 'delivered'"
        return await count(database, query) == NUM_JOBS

    await wait_until(are_told, timeout_s=600)
    # Time for those who come late.
    await asyncio.sleep(2 * LEASE_S)


async def wait_for_ends(database: Database, num_jobs: int) -> None:
    async def are_there() -> bool:
        return await count(database, "SELECT count(*) FROM ends") >= num_jobs

    await wait_until(are_there, timeout_s=600)


async def count(database: Database, query: str) -> int:
    async with database.connect() as connection:
        return (await connection.execute(text(query))).scalar_one()


async def check_all(database: Database, store: Store, results: Results) -> int:
    """Every job is there, ready and its seed's; how often one was lost with its gateway."""
    async with database.connect() as connection:
        rows = (await connection.execute(JOBS.select())).mappings().all()
    jobs = {job.seed: job for job in map(job_of, rows)}
    assert len(rows) == len(jobs) == NUM_JOBS
    assert {job.status for job in jobs.values()} == {"ready"}
    for seed, job in jobs.items():
        request = offer_for(seed).request
        images = [await results.read_image(image) for image in job.result.images]
        assert images == [image_for(request, each) for each in request.seeds]
    assert await count(database, "SELECT count(*) FROM ends WHERE status = 'ready'") == NUM_JOBS
    assert await count(database, "SELECT count(*) FROM ends") == NUM_JOBS
    assert await store.claim("nobody") is None
    num_lost = sum(job.num_lost for job in jobs.values())
    assert num_lost > 0
    return num_lost


async def check_told(database: Database, receiver: WebhookReceiver) -> str:
    """Every job was told of, as it is and signed; how often."""
    verifier = Webhook(SECRET)
    async with database.connect() as connection:
        rows = (await connection.execute(JOBS.select())).mappings().all()
    jobs = {row["job_id"]: row for row in rows}
    assert receiver.taken.keys() == jobs.keys()
    for post in receiver.posts:
        # Not `verify`, which finds a storm of five minutes too old.
        sent_at = datetime.fromtimestamp(int(post.headers["webhook-timestamp"]), UTC)
        signature = verifier.sign(post.headers["webhook-id"], sent_at, post.body.decode())
        assert signature in post.headers["webhook-signature"].split()
        told = json.loads(post.body)
        job = jobs[post.headers["webhook-id"]]
        assert told == {"id": job["job_id"], "status": "ready", "seed": job["seed"]}
    assert await WebhookOutbox(database, LEASE_S).claim() is None
    num_lost = sum(row["webhook_attempt"] - 1 - row["webhook_num_failed"] for row in rows)
    num_repeats = receiver.taken.total() - NUM_JOBS
    return f"{len(receiver.posts)} posts, {num_lost} lost with a gateway, {num_repeats} told twice"
