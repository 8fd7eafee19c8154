"""Requests whose images are elsewhere until it is their turn; until then sizes and digests do."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from flux_ray.request import ImageRequest, RgbImage

Load = Callable[[], Awaitable[ImageRequest]]


@dataclass(frozen=True)
class DeferredRequest(ImageRequest):
    """A request that has outlines for references: enough to price it, and to name it in caches.

    `load` brings the whole one. Call it when a replica is granted, not before: of all requests
    that wait together, a gateway could not hold the pixels.
    """

    load: Load = field(kw_only=True, compare=False, repr=False)


def outline_of(width: int, height: int, digest: bytes) -> RgbImage:
    """Return a raster without pixels, which caches name as the one that it stands for."""
    outline = RgbImage(width, height, b"")
    # Where the cached property would keep it.
    outline.__dict__["digest"] = digest
    return outline


async def loaded(request: ImageRequest) -> ImageRequest:
    """Return the request with all its pixels. Raises what its `load` raises."""
    return await request.load() if isinstance(request, DeferredRequest) else request
