"""A process that accepts all jobs of the chaos test, works on them and tells of them."""

import asyncio
import json
import logging
import random
import sys

from flux_ray.config.gateway import Webhooks
from flux_ray.gateway.webhooks import Poster
from flux_ray.jobs.attempt import WorkerContext
from flux_ray.jobs.cleanup import keep_clean
from flux_ray.jobs.database import Database
from flux_ray.jobs.images import Results
from flux_ray.jobs.job import Idempotency, Job, JobSubmission, Webhook
from flux_ray.jobs.service import accept
from flux_ray.jobs.store import Store
from flux_ray.jobs.webhooks import Mail, WebhookOutbox, WebhookWorker
from flux_ray.jobs.worker import Worker
from flux_ray.request import ImageRequest, ImageResult, RgbImage
from tests.jobs.painter import paint

LEASE_S = 1.0
MAX_RUNNING = 4
# Above what a job may meet by bad luck: none is to be given up.
MAX_LOST = 20
RETRIES_S = (0.2,) * 100
SECRET = "whsec_c3Rvcm0="


def offer_for(seed: int, port: int = 0) -> JobSubmission:
    """Some have reference images; all are told of to the receiver at that port."""
    references = (RgbImage(8, 8, bytes([seed]) * 192),) * (seed % 3)
    request = ImageRequest(
        "r", "tiny", f"no. {seed}", 64, 64, 4, 1.0, seed, 1 + seed % 2, references
    )
    webhook = Webhook(f"http://127.0.0.1:{port}/moody", SECRET)
    return JobSubmission("anna", request, Idempotency(f"key {seed}", f"words {seed}"), webhook)


async def generate(job: object, request: ImageRequest) -> ImageResult:
    return await paint(job, request, random.uniform(0.2, 1.0))


async def message_of(job: Job) -> bytes:
    return json.dumps({"id": job.job_id, "status": job.status, "seed": job.seed}).encode()


def postman_for(database: Database, port: int) -> WebhookWorker:
    args = {"schemes": ("http",), "ports": (port,), "networks": ("127.0.0.0/8",)}
    poster = Poster(Webhooks.model_validate(args))
    mailbox = WebhookOutbox(database, LEASE_S)
    return WebhookWorker(mailbox, Mail(message_of, poster.post), RETRIES_S, MAX_LOST, poll_s=0.1)


async def main(
    database_url: str, results_url: str, options: dict[str, str], num_jobs: int, port: int
) -> None:
    database = Database(database_url)
    await database.create()
    store = Store(database, LEASE_S, keep_s=3600)
    results = Results(results_url, options)
    workshop = WorkerContext(store, results, generate, pause_s=0.1, max_lost=MAX_LOST)
    worker = Worker(workshop, MAX_RUNNING, poll_s=0.1)
    worker.start()
    postman = postman_for(database, port)
    postman.start()
    cleaning = asyncio.create_task(keep_clean(store, results, period_s=0.5))
    # Clients that hear nothing ask again, elsewhere too.
    for seed in random.sample(range(num_jobs), num_jobs):
        await accept(store, results, offer_for(seed, port))
    await cleaning


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    database_url, results_url, options, num_jobs, port = sys.argv[1:]
    asyncio.run(main(database_url, results_url, json.loads(options), int(num_jobs), int(port)))
