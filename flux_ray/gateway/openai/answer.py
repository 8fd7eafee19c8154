"""Answer in OpenAI's format, at once or as server-sent events.

`answer_for` makes the body and headers of a plain answer from a result. `stream` answers with
events: previews if any were asked for, and each image as soon as it is done. Fields that are not
OpenAI's, such as seeds and warnings, come after OpenAI's own.
"""

import base64
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from itertools import islice
from typing import Literal

from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse

from flux_ray.catalog import Tier, tier_for
from flux_ray.errors import FluxError
from flux_ray.gateway.errors import ErrorEvent, failure_of
from flux_ray.gateway.http import HEADERS, MEDIA_TYPE, event_text, kept_alive
from flux_ray.gateway.openai.fields import ImageFields, warnings_of
from flux_ray.gateway.submit import PreparedRequest, Submitter
from flux_ray.gateway.upsampling.rewriting import NOT_REWRITTEN, Rewriting
from flux_ray.request import (
    EventStream,
    Finished,
    GeneratedImage,
    ImageFormat,
    ImageRequest,
    ImageResult,
    Preview,
    Progress,
    QueuePosition,
    RequestEvent,
)

logger = logging.getLogger("ray.serve")

# How pydantic writes an image without its base64, which `with_images` puts in later.
NO_IMAGE = b'"b64_json":""'


class AnsweredImage(BaseModel):
    """One image, as base64 or as a URL; with this seed, the same request generates it again.

    `revised_prompt`: the words that it was generated from, if the caller's were upsampled. Sent
    without `prompt_upsampling`, they generate it again.
    """

    b64_json: str | None = None
    url: str | None = None
    seed: int
    revised_prompt: str | None = None


class InputDetails(BaseModel):
    """The input tokens by what they stand for: the text and the reference images."""

    text_tokens: int
    image_tokens: int


class TokenUsage(BaseModel):
    """The tokens that the transformer takes and makes: padded text, and patches of images."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails


class Answer(BaseModel):
    """The body of an answer: OpenAI's fields, then id, model, warnings and each image's seed."""

    created: int
    data: list[AnsweredImage]
    output_format: ImageFormat
    size: str
    usage: TokenUsage
    id: str
    model: str
    warnings: list[str]


def answer_for(
    request: ImageRequest,
    result: ImageResult,
    warnings: list[str],
    started_s: float,
    urls: tuple[str, ...] | None = None,
    rewriting: Rewriting = NOT_REWRITTEN,
) -> Response:
    """Return the plain answer: its JSON body, and headers with seed, model and timing.

    `started_s`: when the request arrived, in seconds of the monotonic clock. `urls`: one for each
    image, if the caller asked for URLs instead of base64. `rewriting`: what became of its prompt.
    """
    answer = Answer(
        created=int(time.time()),
        data=images_of(result, urls, rewriting.prompt_on(result.tier)),
        output_format=request.encoding.format,
        size="{}x{}".format(*request.output_size),
        usage=usage_for(request),
        id=result.request_id,
        model=result.tier,
        warnings=warnings,
    )
    headers = {
        "x-flux-seed": str(request.seed),
        "x-flux-model": result.tier,
        "server-timing": server_timing(result, started_s, rewriting.seconds),
    }
    body = answer.model_dump_json(exclude_none=True).encode()
    if urls is None:
        body = with_images(body, result)
    return Response(body, media_type="application/json", headers=headers)


def images_of(
    result: ImageResult, urls: tuple[str, ...] | None, revised_prompt: str | None
) -> list[AnsweredImage]:
    """Return the images with their URLs, or with an empty base64 that `with_images` replaces."""
    if urls is None:
        return [
            AnsweredImage(b64_json="", seed=image.seed, revised_prompt=revised_prompt)
            for image in result.images
        ]
    return [
        AnsweredImage(url=url, seed=image.seed, revised_prompt=revised_prompt)
        for url, image in zip(urls, result.images, strict=True)
    ]


def with_images(body: bytes, result: ImageResult) -> bytes:
    """Return the JSON `body` with the images' base64 in the empty places that are left for it.

    Pydantic copies and scans megabytes of text three times, which takes longer than base64 itself.
    No text of a client comes before `data`, and within it JSON escapes the quotes of a prompt, so
    the first empty places are those of the images.
    """
    before, *after = body.split(NO_IMAGE, len(result.images))
    parts = [before]
    for image, rest in zip(result.images, after, strict=True):
        parts += [b'"b64_json":"', base64.b64encode(image.data), b'"', rest]
    return b"".join(parts)


def usage_for(request: ImageRequest) -> TokenUsage:
    """Return how many tokens the transformer takes and makes for a request."""
    tier = tier_for(request.tier)
    sizes = request.reference_sizes
    pixels = [tier.pixels_added_by(*size, is_alone=len(sizes) == 1) for size in sizes]
    image_tokens = sum(pixels) // tier.size_multiple**2
    output_tokens = request.num_images * num_patches(request.width, request.height, tier)
    details = InputDetails(text_tokens=tier.text_tokens(request.prompt), image_tokens=image_tokens)
    input_tokens = details.text_tokens + details.image_tokens
    return TokenUsage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        total_tokens=input_tokens + output_tokens,
        input_tokens_details=details,
    )


def num_patches(width: int, height: int, tier: Tier) -> int:
    """Return the transformer's tokens of an image; pixels beyond the last whole patch are cut."""
    return (width // tier.size_multiple) * (height // tier.size_multiple)


def server_timing(result: ImageResult, started_s: float, upsample_s: float | None = None) -> str:
    """Return a Server-Timing header, which browsers show: the stages in milliseconds.

    `total` is measured in this gateway, from the arrival of the request, and covers the others.
    """
    upsampling_s = {} if upsample_s is None else {"upsample": upsample_s}
    stages_s = upsampling_s | {
        "queue": result.times.queue_s,
        "encode": result.times.encode_s,
        "denoise": result.times.denoise_s,
        "decode": result.times.decode_s,
        "file": result.times.file_s,
        "total": time.monotonic() - started_s,
    }
    return ", ".join(f"{stage};dur={1000 * taken_s:.1f}" for stage, taken_s in stages_s.items())


Kind = Literal["image_generation", "image_edit"]


class Times(BaseModel):
    """Seconds of each stage of a request with all its images, and the GPU seconds that it took.

    `upsample_s`: those of an LLM with the prompt, if it was to be upsampled.
    """

    upsample_s: float | None = None
    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    file_s: float
    gpu_s: float


class StreamEvent(BaseModel):
    """One event: OpenAI's fields, then id, model, seed, warnings and times.

    Previews have a `partial_image_index`, finished images a `usage`, and the images that come with
    the end of the request its `times`: a stream's headers are sent before there are any.
    """

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
    revised_prompt: str | None = None
    warnings: list[str] = []
    times: Times | None = None


async def stream(
    submitter: Submitter, prepared: PreparedRequest, fields: ImageFields, kind: Kind
) -> StreamingResponse:
    """Answer with server-sent events.

    An error before the first event is raised, so that it is answered with its own HTTP status;
    later ones come as an event, since the 200 has been sent.
    """
    telling = EventWriter(prepared, fields, kind, submitter.router.gpu_seconds_of)
    texts = kept_alive(telling.texts(submitter.stream(prepared)), telling.standing)
    first = await anext(texts)

    async def all_texts() -> AsyncIterator[str]:
        # If the client leaves between two events, this cancels the images that are not done.
        async with aclosing(texts):
            yield first
            try:
                async for text in texts:
                    yield text
            except FluxError as error:
                logger.warning("request %s: %s", prepared.requests[0].request_id, error)
                told = ErrorEvent(error=failure_of(error), retry_after_s=error.retry_after_s)
                yield event_text("error", told)

    headers = HEADERS | {"x-flux-seed": str(prepared.requests[0].seed)}
    return StreamingResponse(all_texts(), media_type=MEDIA_TYPE, headers=headers)


class EventWriter:
    """The events of one request for OpenAI's clients: each preview and each image exactly once."""

    def __init__(
        self,
        prepared: PreparedRequest,
        fields: ImageFields,
        kind: Kind,
        gpu_seconds_of: Callable[[ImageResult], float],
    ) -> None:
        self._prepared = prepared
        self._gpu_seconds_of = gpu_seconds_of
        self._fields = fields
        self._kind = kind
        self._standing = "waiting"
        self._num_previews = self._num_finished = 0

    def standing(self) -> str:
        """Return its place in the queue or its progress, in words for a keep-alive comment."""
        return self._standing

    async def texts(self, events: EventStream) -> AsyncGenerator[str, None]:
        """Yield the text of an event for each preview and each finished image."""
        async with aclosing(events):
            async for each in events:
                for event in self._events_of(each):
                    yield event_text(event.type, event)

    def _events_of(self, news: RequestEvent | ImageResult) -> Iterator[StreamEvent]:
        if isinstance(news, QueuePosition | Progress):
            self._standing = words_for(news)
        # If the replica dies, a second one starts again: its previews and images are the same, and
        # those that the client already has must not come twice.
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
        generated: ImageResult | Preview | Finished,
        index: int | None = None,
    ) -> StreamEvent:
        request = self._prepared.request_of(generated)
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
            revised_prompt=self._prepared.rewriting.prompt_on(request.tier),
            warnings=[
                *warnings_of(self._fields, request, generated),
                *self._prepared.notes_on(generated),
            ],
            times=self._times_of(generated) if isinstance(generated, ImageResult) else None,
        )

    def _times_of(self, result: ImageResult) -> Times:
        seconds = {
            name: round(getattr(result.times, name), 4)
            for name in ("queue_s", "encode_s", "denoise_s", "decode_s", "file_s")
        }
        rewriting = self._prepared.rewriting
        gpu_s = self._gpu_seconds_of(result) + rewriting.gpu_s
        upsample_s = None if rewriting.seconds is None else round(rewriting.seconds, 4)
        return Times(**seconds, upsample_s=upsample_s, gpu_s=round(gpu_s, 4))


def words_for(news: QueuePosition | Progress) -> str:
    """Return where a request stands, in words that a program can parse too."""
    if isinstance(news, Progress):
        return f"generating progress={news.share:.2f}"
    expected = "" if news.expected_s is None else f" expected_s={news.expected_s:.1f}"
    return f"queued position={news.position}{expected}"
