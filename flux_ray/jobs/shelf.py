"""The shelf: finished pictures by their names, whoever's they are."""

from pydantic import TypeAdapter
from sqlalchemy import select

from flux_ray.jobs.database import Database
from flux_ray.jobs.job import JobResult, StoredPicture
from flux_ray.jobs.results import ResultMissing, Results
from flux_ray.jobs.table import JOBS

RESULT = TypeAdapter(JobResult)


class Shelf:
    """Pictures count only while a row names them: those of lost attempts are not here.

    Everything raises StoreLost and ResultsLost.
    """

    def __init__(self, database: Database, results: Results) -> None:
        self._database = database
        self._results = results

    async def read(self, name: str) -> bytes:
        """The very bytes that were written under that name. Raises ResultMissing."""
        return await self._results.read_picture(await self._find(name))

    async def _find(self, name: str) -> StoredPicture:
        """As its job's row tells of it."""
        query = select(JOBS.c.result).where(
            JOBS.c.job_id == name.partition("/")[0],
            JOBS.c.status == "ready",
            JOBS.c.expires_at_s > self._database.now,
        )
        for row in await self._database.execute(query):
            for picture in RESULT.validate_python(row["result"]).pictures:
                if picture.name == name:
                    return picture
        raise ResultMissing("no job has a picture of that name")
