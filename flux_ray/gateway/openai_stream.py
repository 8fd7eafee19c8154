"""OpenAI's answer as server-sent events: previews where there are any, then the pictures."""

import base64
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel
from starlette.responses import StreamingResponse

from flux_ray.errors import FluxError
from flux_ray.following import follow
from flux_ray.gateway.failures import Envelope, failure_of
from flux_ray.gateway.openai_answer import Usage, usage_for
from flux_ray.gateway.openai_fields import ImageFields
from flux_ray.gateway.openai_warnings import warnings_of
from flux_ray.gateway.orders import Order, Orders
from flux_ray.request import GeneratedImage, ImageFormat, ImageRequest, ImageResult, Preview
from flux_ray.router.cascade import Part, cascade

logger = logging.getLogger("ray.serve")

EVENT_STREAM = "text/event-stream"
Kind = Literal["image_generation", "image_edit"]


class Event(BaseModel):
    """OpenAI's fields, then ours. A preview has an index, and a picture what it took."""

    type: str
    b64_json: str
    created_at: int
    output_format: ImageFormat
    size: str
    quality: str = "auto"
    background: str = "opaque"
    partial_image_index: int | None = None
    usage: Usage | None = None
    id: str
    model: str
    seed: int
    warnings: list[str] = []


async def parts_of(orders: Orders, order: Order) -> AsyncGenerator[Part | Preview, None]:
    """The pictures as they come, by the target's policy."""
    best, *others = order.requests
    if order.target.alias.policy == "cascade" and others:
        # The fast tier's picture is the preview.
        early, late = (replace(each, num_previews=0) for each in (others[-1], best))
        parts: AsyncGenerator[Part | Preview, None] = cascade(
            orders.router, early, late, order.caller
        )
    elif best.num_previews:
        parts = previewed(orders, order)
    else:
        yield Part(await orders.draw(order), is_final=True)
        return
    async with aclosing(parts):
        async for part in parts:
            yield part


async def previewed(orders: Orders, order: Order) -> AsyncGenerator[Part | Preview, None]:
    """Previews of the pictures while they are drawn, each once, and the pictures."""
    num_shown = 0
    async with aclosing(follow(lambda hear: orders.draw(order, hear))) as stream:
        async for news in stream:
            if isinstance(news, ImageResult):
                yield Part(news, is_final=True)
            # A second replica begins anew: its previews are the same.
            elif isinstance(news, Preview) and news.number == num_shown:
                num_shown += 1
                yield news


async def stream(
    parts: AsyncGenerator[Part | Preview, None], order: Order, fields: ImageFields, kind: Kind
) -> StreamingResponse:
    """The answer, once there is something to send: errors until then are plain answers."""
    first = await anext(parts)

    async def texts() -> AsyncIterator[str]:
        # A client that leaves between two events ends what is still drawn.
        async with aclosing(parts):
            for text in texts_of(first, order, fields, kind):
                yield text
            try:
                async for part in parts:
                    for text in texts_of(part, order, fields, kind):
                        yield text
            except FluxError as error:
                logger.warning("request %s: %s", order.requests[0].request_id, error)
                yield event_text("error", Envelope(error=failure_of(error)))

    headers = {"x-flux-seed": str(order.requests[0].seed), "cache-control": "no-store"}
    return StreamingResponse(texts(), media_type=EVENT_STREAM, headers=headers)


def texts_of(part: Part | Preview, order: Order, fields: ImageFields, kind: Kind) -> list[str]:
    """One event a picture."""
    drawn = part.result if isinstance(part, Part) else part
    request = order.request_of(drawn)
    warnings = warnings_of(fields, drawn)
    events = [
        event_of(kind, image, index, request, warnings) for image, index in indexed_images(part)
    ]
    return [event_text(event.type, event) for event in events]


def indexed_images(part: Part | Preview) -> list[tuple[GeneratedImage, int | None]]:
    """Previews with their index, final pictures without."""
    if isinstance(part, Preview):
        return [(part.image, part.number)]
    images = part.result.images
    return [(image, None if part.is_final else index) for index, image in enumerate(images)]


def event_of(
    kind: Kind, image: GeneratedImage, index: int | None, request: ImageRequest, warnings: list[str]
) -> Event:
    """Of one picture, or of a preview."""
    is_final = index is None
    return Event(
        type=f"{kind}.{'completed' if is_final else 'partial_image'}",
        b64_json=base64.b64encode(image.data).decode("ascii"),
        created_at=int(time.time()),
        output_format=request.encoding.format,
        size=f"{request.width}x{request.height}",
        partial_image_index=index,
        usage=usage_for(request) if is_final else None,
        id=request.request_id,
        model=request.tier,
        seed=image.seed,
        warnings=warnings,
    )


def event_text(name: str, data: BaseModel) -> str:
    """As it goes over the wire."""
    return f"event: {name}\ndata: {data.model_dump_json(exclude_none=True)}\n\n"
