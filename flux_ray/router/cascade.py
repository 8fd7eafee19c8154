"""A preview by a fast tier while a better one draws: both of the same request, words and seed."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import NamedTuple

from flux_ray.errors import FluxError
from flux_ray.request import ImageRequest, ImageResult, OnEvent
from flux_ray.router.quote import Caller
from flux_ray.router.router import Router

logger = logging.getLogger("ray.serve")


class Part(NamedTuple):
    """Images of a request: a preview, or what was asked for."""

    result: ImageResult
    is_final: bool


async def cascade(
    router: Router,
    preview: ImageRequest,
    final: ImageRequest,
    caller: Caller,
    hear: OnEvent | None = None,
) -> AsyncGenerator[Part, None]:
    """The preview, if it is there before the final images, and those. Close it to leave.

    `hear` is told how the final images come along. A preview that fails costs nothing but
    itself; the errors are those of `generate` for `final`.
    """
    early = asyncio.create_task(router.generate(preview, caller))
    late = asyncio.create_task(router.generate(final, caller, hear))
    try:
        await asyncio.wait((early, late), return_when=asyncio.FIRST_COMPLETED)
        if not late.done():
            try:
                yield Part(await early, is_final=False)
            except FluxError as error:
                logger.info("request %s has no preview: %s", preview.request_id, error)
        yield Part(await late, is_final=True)
    finally:
        early.cancel()
        late.cancel()
        await asyncio.gather(early, late, return_exceptions=True)
