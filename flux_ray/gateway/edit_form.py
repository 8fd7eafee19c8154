"""The multipart body of an edit: text parts, and reference pictures as file parts."""

import asyncio
from collections.abc import Iterable

from starlette.datastructures import FormData, UploadFile

from flux_ray.catalog import Tier
from flux_ray.config import Limits
from flux_ray.errors import BadReference, BadRequest
from flux_ray.gateway.openai_fields import NOT_YET
from flux_ray.gateway.references import decode
from flux_ray.request import Raster

IMAGE_PARTS = ("image", "image[]")


def text_parts(form: FormData) -> dict[str, str]:
    """The parts that are no pictures, each name once."""
    parts: dict[str, str] = {}
    for name, value in form.multi_items():
        if name in IMAGE_PARTS:
            continue
        if name in NOT_YET:
            raise BadRequest(NOT_YET[name], name)
        if isinstance(value, UploadFile):
            raise BadRequest(f"{name[:80]} must be text, not a file", name[:80])
        if name in parts:
            raise BadRequest(f"{name[:80]} was sent twice", name[:80])
        parts[name] = value
    return parts


def image_parts(form: FormData, tier: Tier) -> list[UploadFile]:
    """The pictures in the order of the form, as many as the tier takes."""
    values = [value for name, value in form.multi_items() if name in IMAGE_PARTS]
    files = [value for value in values if isinstance(value, UploadFile)]
    if len(files) < len(values):
        raise BadReference("image must be a file part, with a filename", "image")
    if not files:
        raise BadReference("image is required", "image")
    if len(files) > tier.max_references:
        raise BadReference(f"{tier.name} takes at most {tier.max_references} images", "image")
    return files


async def read_references(files: Iterable[UploadFile], limits: Limits) -> tuple[Raster, ...]:
    """The decoded pictures; decoding takes a while, so it is done off the event loop."""
    references = []
    for number, file in enumerate(files, start=1):
        data = await file.read(limits.max_image_bytes + 1)
        references.append(await asyncio.to_thread(decode, data, limits, f"image {number}"))
    return tuple(references)
