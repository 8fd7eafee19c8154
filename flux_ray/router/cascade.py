"""Show a preview by a fast tier while a better one generates the same prompt from the same seed."""

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
    """Yield the events of `final` and its images, with the images of `preview` as previews.

    A preview that fails, or comes later than the final images, is left out; the errors are those
    of `Router.generate` for `final`.
    """

    async def generate(on_event: OnEvent) -> ImageResult:
        # What was spent on both of them is charged once.
        early = asyncio.create_task(router.generate(preview, replace(caller, spent_gpu_s=0.0)))
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
