"""From our result to OpenAI's answer: body and headers."""

import base64
import math
import time

from pydantic import BaseModel
from starlette.responses import Response

from flux_ray.catalog.tiers import Tier, tier_for
from flux_ray.request import ImageFormat, ImageRequest, ImageResult

# As pydantic writes a picture whose base64 is to come.
NO_PICTURE = b'"b64_json":""'


class AnsweredImage(BaseModel):
    """One image, itself or its URL; with this seed, the same request draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class InputDetails(BaseModel):
    """Of what the transformer read."""

    text_tokens: int
    image_tokens: int


class TokenUsage(BaseModel):
    """Tokens as the transformer counts them: padded text, and patches of pictures."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails


class Answer(BaseModel):
    """OpenAI's fields, then ours: id, model, warnings, and every picture's seed."""

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
) -> Response:
    """The whole answer; `started_s` is when the request came, on the monotonic clock."""
    answer = Answer(
        created=int(time.time()),
        data=pictures_of(result, urls),
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
        "server-timing": server_timing(result, started_s),
    }
    body = answer.model_dump_json(exclude_none=True).encode()
    if urls is None:
        body = with_pictures(body, result)
    return Response(body, media_type="application/json", headers=headers)


def pictures_of(result: ImageResult, urls: tuple[str, ...] | None) -> list[AnsweredImage]:
    """By their URLs where there are any; else without their base64, which is put in as bytes."""
    if urls is not None:
        pairs = zip(urls, result.images, strict=True)
        return [AnsweredImage(url=url, seed=image.seed) for url, image in pairs]
    return [AnsweredImage(b64_json="", seed=image.seed) for image in result.images]


def with_pictures(body: bytes, result: ImageResult) -> bytes:
    """Put the images as base64 into an answer's JSON, in which their places are empty.

    Megabytes of text take pydantic longer than base64 itself: it copies and scans them thrice. No
    text of a client's stands before `data`, so that the first empty places are the images'.
    """
    before, *after = body.split(NO_PICTURE, len(result.images))
    parts = [before]
    for image, rest in zip(result.images, after, strict=True):
        parts += [b'"b64_json":"', base64.b64encode(image.data), b'"', rest]
    return b"".join(parts)


def usage_for(request: ImageRequest) -> TokenUsage:
    """How much the transformer reads and draws."""
    tier = tier_for(request.tier)
    image_tokens = sum(reference_tokens(*size, tier) for size in request.reference_sizes)
    output_tokens = request.num_images * num_patches(request.width, request.height, tier)
    details = InputDetails(text_tokens=tier.text_length, image_tokens=image_tokens)
    input_tokens = details.text_tokens + details.image_tokens
    return TokenUsage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        total_tokens=input_tokens + output_tokens,
        input_tokens_details=details,
    )


def reference_tokens(width: int, height: int, tier: Tier) -> int:
    """Of a reference as the model reads it: scaled down, each side rounded down, to its limit."""
    scale = min(1.0, math.sqrt(tier.max_reference_pixels / (width * height)))
    return num_patches(int(width * scale), int(height * scale), tier)


def num_patches(width: int, height: int, tier: Tier) -> int:
    """The transformer's tokens of a picture; what is left over at its sides is cut."""
    return (width // tier.size_multiple) * (height // tier.size_multiple)


def server_timing(result: ImageResult, started_s: float) -> str:
    """The stages in milliseconds, as browsers show them; the last is the gateway's own count."""
    stages_s = {
        "queue": result.times.queue_s,
        "encode": result.times.encode_s,
        "denoise": result.times.denoise_s,
        "decode": result.times.decode_s,
        "file": result.times.file_s,
        "total": time.monotonic() - started_s,
    }
    return ", ".join(f"{stage};dur={1000 * taken_s:.1f}" for stage, taken_s in stages_s.items())
