"""Loads the references of jobs when there is room for them: they were accepted, so they wait."""

from dataclasses import replace

from flux_ray.config.gateway import Limits
from flux_ray.gateway.memory_budget import MEMORY
from flux_ray.request import DeferredRequest, ImageRequest

# The pixels, and first what they are unpacked from, then what they are sent in.
COPIES = 2


def within_budget(request: ImageRequest, limits: Limits) -> ImageRequest:
    """Return the request, whose pixels are counted from before they are loaded until they go."""
    num_bytes = COPIES * num_pixel_bytes(request)
    if not isinstance(request, DeferredRequest) or not num_bytes:
        return request
    load = request.load

    async def load_within() -> ImageRequest:
        share = await MEMORY.room(num_bytes, limits.max_kept_bytes)
        try:
            return share.hold_with(await load())
        except BaseException:
            share.release()
            raise

    return replace(request, load=load_within)


def num_pixel_bytes(request: ImageRequest) -> int:
    """Of all its references and its mask, by their sizes."""
    pixels = sum(3 * each.width * each.height for each in request.references)
    return pixels if request.mask is None else pixels + request.mask.width * request.mask.height
