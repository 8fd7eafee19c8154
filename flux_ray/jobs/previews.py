"""Shows what a job will look like while it is drawn, where any gateway finds it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from flux_ray.errors import StoreLost
from flux_ray.jobs.job import Lease, StoredImage
from flux_ray.jobs.lease_worker import spawn
from flux_ray.jobs.results import Results, ResultTooLarge
from flux_ray.jobs.store import Store
from flux_ray.request import GeneratedImage

logger = logging.getLogger("ray.serve")

# The last one that was heard of, if there is one.
Last = Callable[[], GeneratedImage | None]


class Previews:
    """Of one attempt. What fails here costs a preview, and never the job."""

    def __init__(self, lease: Lease, store: Store, results: Results, last: Last) -> None:
        self._lease = lease
        self._store = store
        self._results = results
        self._last = last
        self._num_written = 0
        self._shown: tuple[StoredImage, ...] = ()

    @asynccontextmanager
    async def shown(self, beat_s: float) -> AsyncIterator[None]:
        """While this is open: looked for at each beat, and removed at its end.

        Who is cancelled is to leave at once: what stays goes when the job has expired.
        """
        showing = spawn(self._show_on(beat_s))
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.wait({showing})
        await self._remove()

    async def _show_on(self, beat_s: float) -> None:
        seen: GeneratedImage | None = None
        while True:
            await asyncio.sleep(beat_s)
            if (image := self._last()) is not None and image is not seen:
                seen = image
                await self._show(image)

    async def _show(self, image: GeneratedImage) -> None:
        job = self._lease.job
        number, self._num_written = self._num_written, self._num_written + 1
        try:
            picture = await self._results.write_preview(
                job.job_id, job.attempt, number, image, job.packed["encoding"]["format"]
            )
            # Those before it stay: somebody may have their URLs.
            self._shown += (picture,)
            await self._store.show(self._lease, self._shown)
        except (StoreLost, ResultTooLarge) as error:
            logger.warning("job %s is not previewed: %s", job.job_id, error)

    async def _remove(self) -> None:
        job = self._lease.job
        form = job.packed["encoding"]["format"]
        try:
            await self._results.remove_previews(job.job_id, job.attempt, self._num_written, form)
        except StoreLost as error:
            logger.warning("job %s keeps its previews for now: %s", job.job_id, error)
