"""Answers by URL: pictures that were just drawn, kept for as long as those of jobs."""

from flux_ray.gateway.results.urls import urls_for
from flux_ray.jobs.service import JobService
from flux_ray.request import ImageRequest, ImageResult


class KeptImages:
    """Where there are jobs there is a place to keep them. Raises StoreLost and ResultsLost."""

    def __init__(self, desk: JobService, public_url: str) -> None:
        self._desk = desk
        self._public_url = public_url

    async def urls_of(
        self, owner: str, request: ImageRequest, result: ImageResult
    ) -> tuple[str, ...]:
        """A signed one of each picture."""
        urls = await urls_for(self._desk, self._public_url)
        pictures = await self._desk.keep(owner, request, result)
        return tuple(urls.url_of(picture) for picture in pictures)
