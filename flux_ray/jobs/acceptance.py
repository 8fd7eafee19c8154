"""Takes offers in: a job is accepted when its row and its reference pictures are kept."""

import asyncio

from flux_ray.errors import StoreLost
from flux_ray.jobs.job import Job, JobSubmission
from flux_ray.jobs.results import Results
from flux_ray.jobs.serialization import compress, pack
from flux_ray.jobs.store import Store


async def accept(store: Store, results: Results, offer: JobSubmission) -> Job:
    """The job, which from now on is never lost.

    Raises KeyReused, RateLimited, StoreLost, ResultsLost and ResultTooLarge: it was not accepted,
    or that is not known; offered again with its idempotency key, it is the same job.
    """
    packed = await asyncio.to_thread(pack, offer.request)
    job = await store.accept(offer, packed.row, is_whole=not packed.pictures)
    if job.status != "arriving":
        return job
    # The gateway that was at it before may be gone: the pictures are the same.
    await results.write_references(job.job_id, packed.pictures, compress)
    admitted = await store.admit(job.job_id)
    if admitted is None:
        raise StoreLost("the reference pictures took too long to be stored")
    return admitted
