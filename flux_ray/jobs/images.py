"""The shelf: pictures of jobs by their names, and those that were drawn without a job."""

import uuid
from dataclasses import asdict

from sqlalchemy import Executable, and_, insert, or_, select, update

from flux_ray.errors import StoreLost
from flux_ray.jobs.database import Database
from flux_ray.jobs.insertion import ARRIVAL_S
from flux_ray.jobs.job import JobResult, StoredImage
from flux_ray.jobs.results import ResultMissing, Results
from flux_ray.jobs.rows import RESULT
from flux_ray.jobs.table import JOBS
from flux_ray.request import ImageRequest, ImageResult

# No key is called so: they are nobody's jobs, and are not found as such.
KEPT_FOR = "kept for "


class ImageStore:
    """Pictures count only while a row names them: those of lost attempts are not here.

    Everything raises StoreLost and ResultsLost. `keep_s`: so long a picture is kept.
    """

    def __init__(self, database: Database, results: Results, keep_s: float) -> None:
        self._database = database
        self._results = results
        self._keep_s = keep_s

    async def read(self, name: str) -> bytes:
        """The very bytes that were written under that name. Raises ResultMissing."""
        return await self._results.read_picture(await self._find(name))

    async def keep(
        self, owner: str, request: ImageRequest, result: ImageResult
    ) -> tuple[StoredImage, ...]:
        """Pictures that somebody waited for, as those of a job that is ready; cleaned up with them.

        Raises ResultTooLarge.
        """
        job_id = str(uuid.uuid4())
        # First the row: what is written without one would never be removed.
        await self._database.first(self._arrival(job_id, owner, request))
        pictures = await self._results.write_pictures(
            job_id, 0, result.images, request.encoding.format
        )
        kept = JobResult(pictures, asdict(result.times), result.warnings)
        if await self._database.first(self._completion(job_id, kept)) is None:
            raise StoreLost("the pictures took too long to be stored")
        return pictures

    def _arrival(self, job_id: str, owner: str, request: ImageRequest) -> Executable:
        now = self._database.now
        values = {
            "job_id": job_id,
            "owner": KEPT_FOR + owner,
            "tier": request.tier,
            # Nobody will draw it again: its words are not kept.
            "packed": {},
            "seed": request.seed,
            "memo": {},
            "status": "arriving",
            "created_at_s": now,
            "expires_at_s": now + ARRIVAL_S,
        }
        return insert(JOBS).values(values).returning(JOBS.c.job_id)

    def _completion(self, job_id: str, result: JobResult) -> Executable:
        now = self._database.now
        values = {
            "status": "ready",
            "result": asdict(result),
            "progress": 1.0,
            "finished_at_s": now,
            "expires_at_s": now + self._keep_s,
        }
        arriving = update(JOBS).where(JOBS.c.job_id == job_id, JOBS.c.status == "arriving")
        return arriving.values(values).returning(JOBS.c.job_id)

    async def _find(self, name: str) -> StoredImage:
        """As its job's row tells of it."""
        is_kept = and_(JOBS.c.status == "ready", JOBS.c.expires_at_s > self._database.now)
        is_previewed = and_(JOBS.c.status == "running", JOBS.c.result.is_not(None))
        named = select(JOBS.c.result).where(
            JOBS.c.job_id == name.partition("/")[0], or_(is_kept, is_previewed)
        )
        if (row := await self._database.first(named)) is not None:
            for picture in RESULT.validate_python(row["result"]).pictures:
                if picture.name == name:
                    return picture
        raise ResultMissing("no job has a picture of that name")
