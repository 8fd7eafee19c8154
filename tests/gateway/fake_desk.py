"""A desk whose jobs are ready at once, for tests in which every request has a loop of its own."""

import uuid
from typing import Any

from flux_ray.jobs.images import ResultMissing
from flux_ray.jobs.job import Idempotency, Job, JobResult, JobSubmission, StoredImage
from flux_ray.request import ImageRequest, ImageResult

IMAGE = b"an image"


class FakeDesk:
    """Keeps everything in memory."""

    def __init__(self) -> None:
        self.jobs: dict[tuple[str, str], Job] = {}

    async def open(self) -> None:
        pass

    def stop_claiming(self) -> None:
        pass

    async def close(self, drain_s: float = 0.0) -> None:
        pass

    async def accept(self, offer: JobSubmission) -> Job:
        job_id = str(uuid.uuid4())
        request = offer.request
        name = f"{job_id}/1-0.{request.encoding.format}"
        result = JobResult((StoredImage(name, request.seed, len(IMAGE), ""),), {})
        packed: dict[str, Any] = {"prompt": request.prompt}
        job = Job(
            job_id,
            offer.owner,
            request.tier,
            packed,
            request.seed,
            "ready",
            progress=1.0,
            attempt=1,
            num_lost=0,
            created_at_s=1.0,
            started_at_s=2.0,
            finished_at_s=3.0,
            result=result,
            memo=offer.memo,
            metadata=dict(offer.metadata),
        )
        self.jobs[offer.owner, job_id] = job
        return job

    async def known(self, owner: str, idempotency: Idempotency) -> Job | None:
        return None

    async def find(self, owner: str, job_id: str) -> Job | None:
        return self.jobs.get((owner, job_id))

    async def list(
        self, owner: str, *, limit: int, before: object = None, state: str | None = None
    ) -> tuple[Job, ...]:
        own = [job for (name, _), job in self.jobs.items() if name == owner]
        return tuple(own[:limit] if state in (None, "ready") else ())

    async def position_of(self, job_id: str) -> int | None:
        return None

    async def cancel(self, owner: str, job_id: str) -> bool:
        return False

    async def num_active(self, owner: str) -> int:
        return 0

    async def keep(
        self, owner: str, request: ImageRequest, result: ImageResult
    ) -> tuple[StoredImage, ...]:
        form, job_id = request.encoding.format, uuid.uuid4()
        return tuple(
            StoredImage(f"{job_id}/0-{number}.{form}", image.seed, len(image.data), "")
            for number, image in enumerate(result.images)
        )

    async def url_secret(self) -> bytes:
        return b"secret"

    async def read_by_name(self, name: str) -> bytes:
        for job in self.jobs.values():
            if job.result is not None and job.result.images[0].name == name:
                return IMAGE
        raise ResultMissing(name)
