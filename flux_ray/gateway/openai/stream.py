"""OpenAI's answer as server-sent events: previews where there are any, and each image when done."""

import base64
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from itertools import islice
from typing import Literal

from pydantic import BaseModel
from starlette.responses import StreamingResponse

from flux_ray.errors import FluxError
from flux_ray.gateway.errors import ErrorEvent, failure_of
from flux_ray.gateway.event_stream import HEADERS, MEDIA_TYPE, event_text, kept_alive
from flux_ray.gateway.openai.answer import TokenUsage, usage_for
from flux_ray.gateway.openai.fields import ImageFields
from flux_ray.gateway.openai.warnings import warnings_of
from flux_ray.gateway.submit import PreparedRequest, Submitter
from flux_ray.request import (
    Draw,
    Finished,
    GeneratedImage,
    Hear,
    ImageFormat,
    ImageResult,
    News,
    Preview,
    Progress,
    QueuePosition,
    follow,
)
from flux_ray.router.cascade import cascade

logger = logging.getLogger("ray.serve")

Kind = Literal["image_generation", "image_edit"]


class StreamEvent(BaseModel):
    """OpenAI's fields, then ours. A preview has an index, and a picture what it took."""

    type: str
    b64_json: str
    created_at: int
    output_format: ImageFormat
    size: str
    quality: str = "auto"
    background: str = "opaque"
    partial_image_index: int | None = None
    usage: TokenUsage | None = None
    id: str
    model: str
    seed: int
    warnings: list[str] = []


def drawing_of(orders: Submitter, order: PreparedRequest) -> Draw:
    """Return how the order's images are drawn, by its target's policy."""
    best, *others = order.requests
    if order.target.alias.policy != "cascade" or not others:
        return lambda hear: orders.draw(order, hear)
    # The fast tier's image is the preview.
    early, late = (replace(each, num_previews=0) for each in (others[-1], best))
    # The images of two tiers are not one run that could be found again.
    caller = replace(order.caller, retry=None)

    async def draw(hear: Hear) -> ImageResult:
        """Let the fast tier's images be heard as previews."""
        result: ImageResult | None = None
        parts = cascade(orders.router, early, late, caller, hear)
        async with aclosing(parts):
            async for part in parts:
                result = part.result
                for index, image in enumerate(() if part.is_final else result.images):
                    hear(Preview(result.tier, image, index))
        assert result is not None, "a cascade ends with the images or an error"
        return result

    return draw


async def stream(
    orders: Submitter, order: PreparedRequest, fields: ImageFields, kind: Kind
) -> StreamingResponse:
    """Answer with events; what goes wrong at once is raised, for a plain answer."""
    telling = EventWriter(order, fields, kind)
    texts = kept_alive(telling.texts(drawing_of(orders, order)), telling.standing)
    first = await anext(texts)

    async def all_texts() -> AsyncIterator[str]:
        # A client that leaves between two events ends what is still drawn.
        async with aclosing(texts):
            yield first
            try:
                async for text in texts:
                    yield text
            except FluxError as error:
                logger.warning("request %s: %s", order.requests[0].request_id, error)
                told = ErrorEvent(error=failure_of(error), retry_after_s=error.retry_after_s)
                yield event_text("error", told)

    headers = HEADERS | {"x-flux-seed": str(order.requests[0].seed)}
    return StreamingResponse(all_texts(), media_type=MEDIA_TYPE, headers=headers)


class EventWriter:
    """Turns what is heard of one order into events, each of its images and previews once."""

    def __init__(self, order: PreparedRequest, fields: ImageFields, kind: Kind) -> None:
        self._order = order
        self._fields = fields
        self._kind = kind
        self._standing = "waiting"
        self._num_previews = self._num_finished = 0

    def standing(self) -> str:
        """Say where the request stands: in the queue, or how far it has come."""
        return self._standing

    async def texts(self, draw: Draw) -> AsyncGenerator[str, None]:
        """Yield an event for each preview and image."""
        async with aclosing(follow(draw)) as news:
            async for each in news:
                for event in self._events_of(each):
                    yield event_text(event.type, event)

    def _events_of(self, news: News | ImageResult) -> Iterator[StreamEvent]:
        if isinstance(news, QueuePosition | Progress):
            self._standing = words_for(news)
        # A second replica begins anew: its previews and images are the same.
        elif isinstance(news, Preview):
            if news.number == self._num_previews:
                self._num_previews += 1
                yield self._event_of(news.image, news, news.number)
        elif isinstance(news, Finished):
            if news.index == self._num_finished:
                self._num_finished += 1
                yield self._event_of(news.image, news)
        elif isinstance(news, ImageResult):
            for image in islice(news.images, self._num_finished, None):
                yield self._event_of(image, news)

    def _event_of(
        self,
        image: GeneratedImage,
        drawn: ImageResult | Preview | Finished,
        index: int | None = None,
    ) -> StreamEvent:
        request = self._order.request_of(drawn)
        is_final = index is None
        return StreamEvent(
            type=f"{self._kind}.{'completed' if is_final else 'partial_image'}",
            b64_json=base64.b64encode(image.data).decode("ascii"),
            created_at=int(time.time()),
            output_format=request.encoding.format,
            size="{}x{}".format(*request.output_size),
            partial_image_index=index,
            usage=usage_for(request) if is_final else None,
            id=request.request_id,
            model=request.tier,
            seed=image.seed,
            warnings=[*warnings_of(self._fields, drawn), *self._order.notes_on(drawn)],
        )


def words_for(news: QueuePosition | Progress) -> str:
    """Say where a request stands, in words that a program can read too."""
    if isinstance(news, Progress):
        return f"generating progress={news.share:.2f}"
    expected = "" if news.expected_s is None else f" expected_s={news.expected_s:.1f}"
    return f"queued position={news.position}{expected}"
