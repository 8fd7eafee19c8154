"""A process that accepts all jobs of the chaos test and works on them, until it is killed."""

import asyncio
import json
import logging
import random
import sys

from flux_ray.jobs.acceptance import accept
from flux_ray.jobs.attempt import Workshop
from flux_ray.jobs.cleaning import keep_clean
from flux_ray.jobs.database import Database
from flux_ray.jobs.job import Idempotency, Offer
from flux_ray.jobs.results import Results
from flux_ray.jobs.store import Store
from flux_ray.jobs.worker import Worker
from flux_ray.request import ImageRequest, ImageResult, Raster
from tests.jobs.painter import paint

LEASE_S = 1.0
MAX_RUNNING = 4
# Above what a job may meet by bad luck: none is to be given up.
MAX_LOST = 20


def offer_for(seed: int) -> Offer:
    """Some have reference pictures."""
    references = (Raster(8, 8, bytes([seed]) * 192),) * (seed % 3)
    request = ImageRequest(
        "r", "tiny", f"no. {seed}", 64, 64, 4, 1.0, seed, 1 + seed % 2, references
    )
    return Offer("anna", request, Idempotency(f"key {seed}", f"words {seed}"))


async def generate(job: object, request: ImageRequest) -> ImageResult:
    return await paint(job, request, random.uniform(0.2, 1.0))


async def main(database_url: str, results_url: str, options: dict[str, str], num_jobs: int) -> None:
    database = Database(database_url)
    await database.create()
    store = Store(database, LEASE_S, keep_s=3600)
    results = Results(results_url, options)
    workshop = Workshop(store, results, generate, pause_s=0.1, max_lost=MAX_LOST)
    worker = Worker(workshop, MAX_RUNNING, poll_s=0.1)
    worker.start()
    cleaning = asyncio.create_task(keep_clean(store, results, period_s=0.5))
    # Clients that hear nothing ask again, elsewhere too.
    for seed in random.sample(range(num_jobs), num_jobs):
        await accept(store, results, offer_for(seed))
    await cleaning


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])))
