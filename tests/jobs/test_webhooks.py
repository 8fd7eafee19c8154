"""The postman: every letter is posted until it is taken or given up, whatever fails."""

import asyncio

import pytest

from flux_ray.config.gateway import JobArgs
from flux_ray.errors import StoreLost
from flux_ray.jobs import webhooks
from flux_ray.jobs.database import Database
from flux_ray.jobs.job import Webhook
from flux_ray.jobs.service import JobService, accept
from flux_ray.jobs.store import Store
from flux_ray.jobs.table import JOBS
from flux_ray.jobs.webhooks import Mail, NotTaken, WebhookOutbox, WebhookWorker
from tests.jobs.painter import paint
from tests.jobs.waiting import wait_until

WEBHOOK = Webhook("https://example.org/hook?token=1", "s3cr3t")
RETRIES_S = (0.01, 0.02)
LEASE_S = 60.0


class Receiver:
    """The other end: `posts` are what came, and `failures` what it raises before it takes any."""

    def __init__(self) -> None:
        self.posts: list[tuple[Webhook, str, bytes]] = []
        self.failures: list[Exception] = []
        self.hangs = False

    async def message_of(self, job) -> bytes:
        return f"{job.job_id} is {job.status}".encode()

    async def post(self, webhook: Webhook, message_id: str, body: bytes) -> None:
        self.posts.append((webhook, message_id, body))
        if self.hangs:
            await asyncio.sleep(60)
        if self.failures:
            raise self.failures.pop(0)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
async def database(database_url):
    """By the database's own clock."""
    database = Database(database_url)
    await database.create()
    yield database
    await database.close()


@pytest.fixture
async def employ(database, receiver):
    """`employ()`: a postman at work, stopped after the test."""
    postmen = []

    def start(
        mailbox=None, message_of=receiver.message_of, max_lost=5, post=None, retries_s=RETRIES_S
    ) -> WebhookWorker:
        mail = Mail(message_of, post or receiver.post)
        mailbox = mailbox or WebhookOutbox(database, LEASE_S)
        postmen.append(WebhookWorker(mailbox, mail, retries_s, max_lost, poll_s=0.02))
        postmen[-1].start()
        return postmen[-1]

    yield start
    for each in postmen:
        await each.stop()


@pytest.fixture
def end_job(database, folder, offer):
    """A job that is cancelled, of which somebody wants to hear."""
    store = Store(database, lease_s=10, keep_s=100)

    async def end(owner="anna") -> str:
        job = await accept(store, folder, offer(owner=owner, webhook=WEBHOOK))
        assert await store.cancel(owner, job.job_id)
        return job.job_id

    return end


@pytest.fixture
def wait_for(database):
    """`wait_for(job_id, state)`, and the attempts that it took."""

    async def wait(job_id: str, state: str) -> int:
        async def has_come() -> bool:
            return (await row_of(database, job_id))["webhook_state"] == state

        await wait_until(has_come)
        return (await row_of(database, job_id))["webhook_attempt"]

    return wait


async def row_of(database, job_id: str):
    async with database.connect() as connection:
        statement = JOBS.select().where(JOBS.c.job_id == job_id)
        return (await connection.execute(statement)).mappings().one()


async def test_a_letter_is_posted_once(employ, receiver, end_job, wait_for):
    job_id = await end_job()
    employ()
    employ()
    assert await wait_for(job_id, "delivered") == 1
    await asyncio.sleep(0.1)
    assert receiver.posts == [(WEBHOOK, job_id, f"{job_id} is cancelled".encode())]


async def test_it_is_posted_again_until_it_is_taken(employ, receiver, end_job, wait_for):
    receiver.failures = [NotTaken("status 500"), NotTaken("no answer")]
    job_id = await end_job()
    employ()
    assert await wait_for(job_id, "delivered") == 3
    # The same id each time: whoever took it already knows it.
    assert [post[1] for post in receiver.posts] == [job_id] * 3


async def test_the_pauses_come_in_their_order(employ, receiver, database, end_job, wait_for):
    pauses = []

    class Impatient(WebhookOutbox):
        async def put_off(self, letter, after_s) -> None:
            pauses.append(after_s)
            await super().put_off(letter, 0)

    receiver.failures = [NotTaken("status 500")] * 6
    job_id = await end_job()
    retries_s = JobArgs().webhook_retries_s
    employ(Impatient(database, LEASE_S), retries_s=retries_s)
    assert await wait_for(job_id, "given up") == 6
    assert pauses == list(retries_s) == [1, 5, 30, 300, 1800]


async def test_it_is_given_up_and_the_log_tells_no_secrets(
    employ, receiver, end_job, wait_for, serve_log
):
    receiver.failures = [NotTaken("status 500")] * 2 + [NotTaken("status 302")]
    job_id = await end_job()
    employ()
    assert await wait_for(job_id, "given up") == 3
    assert f"webhook of job {job_id} is given up: status 302" in serve_log.text
    assert "waits for 0.02 s: status 500" in serve_log.text
    for secret in ("s3cr3t", "token", "example.org", "is cancelled"):
        assert secret not in serve_log.text


async def test_a_mistake_of_ours_is_tried_again_and_told_without_its_words(
    employ, receiver, end_job, wait_for, serve_log
):
    async def message_of(job) -> bytes:
        raise ValueError(job.packed["prompt"])

    job_id = await end_job()
    employ(message_of=message_of)
    assert await wait_for(job_id, "given up") == 3
    assert "ValueError" in serve_log.text and "in message_of" in serve_log.text
    assert "image 7" not in serve_log.text


async def test_a_gateway_that_closes_gives_its_letters_back(
    employ, receiver, database, end_job, wait_for
):
    receiver.hangs = True
    job_id = await end_job()
    first = employ(WebhookOutbox(database, LEASE_S))

    async def is_posting() -> bool:
        return len(receiver.posts) == 1

    await wait_until(is_posting)
    await first.stop()
    receiver.hangs = False
    employ(WebhookOutbox(database, LEASE_S))
    assert await wait_for(job_id, "delivered") == 1
    assert len(receiver.posts) == 2


async def test_a_gateway_that_closes_gives_back_no_letter_that_was_taken(
    employ, receiver, database, end_job, wait_for
):
    class Slow(WebhookOutbox):
        async def delivered(self, letter) -> None:
            if not begun.is_set():
                begun.set()
                await asyncio.sleep(60)
            await super().delivered(letter)

    begun = asyncio.Event()
    job_id = await end_job()
    first = employ(Slow(database, LEASE_S))
    await begun.wait()
    await first.stop()
    assert await wait_for(job_id, "delivered") == 1
    assert len(receiver.posts) == 1


async def test_a_gateway_that_closes_sees_its_posts_end(employ, receiver, end_job, wait_for):
    async def post(webhook: Webhook, message_id: str, body: bytes) -> None:
        receiver.posts.append((webhook, message_id, body))
        await asyncio.sleep(0.2)

    job_id = await end_job()
    first = employ(post=post)

    async def is_posting() -> bool:
        return len(receiver.posts) == 1

    await wait_until(is_posting)
    await first.stop(drain_s=10)
    assert await wait_for(job_id, "delivered") == 1


async def test_a_store_that_is_away_is_no_fault_of_the_letter(
    employ, receiver, database, end_job, wait_for
):
    class CutOff(WebhookOutbox):
        num_lost = 2

        async def delivered(self, letter) -> None:
            if self.num_lost:
                self.num_lost -= 1
                raise StoreLost("cut")
            await super().delivered(letter)

    job_id = await end_job()
    employ(CutOff(database, lease_s=0.3))
    assert await wait_for(job_id, "delivered") == 3
    assert len(receiver.posts) == 3
    assert (await row_of(database, job_id))["webhook_num_failed"] == 0


async def test_what_is_lost_with_every_gateway_is_given_up(
    employ, receiver, database, end_job, wait_for
):
    job_id = await end_job()
    lost = WebhookOutbox(database, lease_s=0.01)
    for _ in range(2):
        assert await lost.claim() is not None
        await asyncio.sleep(0.02)
    employ(max_lost=2)
    await wait_for(job_id, "given up")
    assert receiver.posts == []


async def test_who_hangs_holds_up_no_other_owner(
    employ, receiver, database, end_job, wait_for, monkeypatch
):
    monkeypatch.setattr(webhooks, "MAX_POSTING", 4)
    monkeypatch.setattr(webhooks, "MAX_POSTING_PER_OWNER", 2)
    hanging = {await end_job("ben") for _ in range(6)}

    async def post(webhook: Webhook, message_id: str, body: bytes) -> None:
        receiver.posts.append((webhook, message_id, body))
        if message_id in hanging:
            await asyncio.sleep(60)

    employ(WebhookOutbox(database, LEASE_S), post=post)
    job_id = await end_job("anna")
    await wait_for(job_id, "delivered")
    assert len(receiver.posts) == 3


async def test_the_desk_tells_of_its_jobs(database_url, tmp_path, receiver, offer):
    args = JobArgs(database=database_url, results=str(tmp_path), webhook_retries_s=(0.01,))
    desk = JobService(args, paint, mail=Mail(receiver.message_of, receiver.post))
    await desk.open()
    receiver.failures = [NotTaken("status 500")]
    job = await desk.accept(offer(webhook=WEBHOOK))

    async def has_come() -> bool:
        return len(receiver.posts) == 2

    await wait_until(has_come)
    assert receiver.posts[1] == (WEBHOOK, job.job_id, f"{job.job_id} is ready".encode())
    await desk.close()
