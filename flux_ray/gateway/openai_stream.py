"""OpenAI's answer as server-sent events: previews where there are any, then the pictures."""

import base64
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Literal

from pydantic import BaseModel
from starlette.responses import StreamingResponse

from flux_ray.errors import FluxError
from flux_ray.gateway.failures import Envelope, failure_of
from flux_ray.gateway.openai_answer import Usage, usage_for
from flux_ray.gateway.openai_fields import ImageFields
from flux_ray.gateway.openai_warnings import warnings_of
from flux_ray.gateway.orders import Order, Orders
from flux_ray.request import ImageFormat, ImageRequest, ImageResult
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


async def parts_of(orders: Orders, order: Order) -> AsyncGenerator[Part, None]:
    """The pictures as they come, by the target's policy."""
    best, *others = order.requests
    if order.target.alias.policy == "cascade" and others:
        async with aclosing(cascade(orders.router, others[-1], best, order.caller)) as parts:
            async for part in parts:
                yield part
    else:
        yield Part(await orders.draw(order), is_final=True)


async def stream(
    parts: AsyncGenerator[Part, None], order: Order, fields: ImageFields, kind: Kind
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


def texts_of(part: Part, order: Order, fields: ImageFields, kind: Kind) -> list[str]:
    """One event a picture."""
    request = order.request_of(part.result)
    warnings = warnings_of(fields, part.result)
    name = f"{kind}.{'completed' if part.is_final else 'partial_image'}"
    return [
        event_text(name, event_of(name, part, number, request, warnings))
        for number in range(len(part.result.images))
    ]


def event_of(
    name: str, part: Part, number: int, request: ImageRequest, warnings: list[str]
) -> Event:
    """Of one picture."""
    result: ImageResult = part.result
    image = result.images[number]
    return Event(
        type=name,
        b64_json=base64.b64encode(image.data).decode("ascii"),
        created_at=int(time.time()),
        output_format=request.encoding.format,
        size=f"{request.width}x{request.height}",
        partial_image_index=None if part.is_final else number,
        usage=usage_for(request) if part.is_final else None,
        id=result.request_id,
        model=result.tier,
        seed=image.seed,
        warnings=warnings,
    )


def event_text(name: str, data: BaseModel) -> str:
    """As it goes over the wire."""
    return f"event: {name}\ndata: {data.model_dump_json(exclude_none=True)}\n\n"
