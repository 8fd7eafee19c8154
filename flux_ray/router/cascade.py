"""A preview by a fast tier while a better one draws: both of the same request, words and seed."""

import asyncio
import logging
from dataclasses import replace

from flux_ray.errors import FluxError
from flux_ray.request import EventStream, ImageRequest, ImageResult, OnEvent, Preview, stream_events
from flux_ray.router.quote import Caller
from flux_ray.router.router import Router

logger = logging.getLogger("ray.serve")


def cascade(
    router: Router, preview: ImageRequest, final: ImageRequest, caller: Caller
) -> EventStream:
    """Yield the events of `final` and its images; as previews before them, those of `preview`.

    A preview that fails, or comes later than the final images, costs nothing but itself; the
    errors are those of `generate` for `final`.
    """

    async def generate(on_event: OnEvent) -> ImageResult:
        early = asyncio.create_task(router.generate(preview, caller))
        late = asyncio.create_task(router.generate(final, replace(caller, on_event=on_event)))
        try:
            await asyncio.wait((early, late), return_when=asyncio.FIRST_COMPLETED)
            if not late.done():
                try:
                    for index, image in enumerate((await early).images):
                        on_event(Preview(preview.tier, image, index))
                except FluxError as error:
                    logger.info("request %s has no preview: %s", preview.request_id, error)
            return await late
        finally:
            early.cancel()
            late.cancel()
            await asyncio.gather(early, late, return_exceptions=True)

    return stream_events(generate)
