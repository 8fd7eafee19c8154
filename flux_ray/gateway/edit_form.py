"""The multipart body of an edit: text parts, and reference pictures as file parts."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from flux_ray.config import Limits
from flux_ray.errors import BadReference, BadRequest
from flux_ray.gateway.openai_unserved import NOT_YET
from flux_ray.gateway.references import decode
from flux_ray.gateway.targets import Target
from flux_ray.request import Raster

IMAGE_PARTS = ("image", "image[]")
MAX_FORM_FILES = 32
MAX_FORM_FIELDS = 64


@asynccontextmanager
async def open_form(request: Request, limits: Limits) -> AsyncIterator[FormData]:
    """The parts of the body; its files are closed in the end."""
    try:
        form = await request.form(
            max_files=MAX_FORM_FILES,
            max_fields=MAX_FORM_FIELDS,
            # Text may be as long as in JSON: a field's own check then names the field.
            max_part_size=limits.max_body_bytes,
        )
    except HTTPException as error:
        raise form_fault(error.detail) from None
    try:
        yield form
    finally:
        await form.close()


def form_fault(detail: str) -> BadRequest:
    """Starlette tells its form faults apart by words only."""
    if detail.startswith("Too many files"):
        return BadReference(f"a form may have at most {MAX_FORM_FILES} images", "image")
    if detail.startswith("Too many fields"):
        return BadRequest(f"a form may have at most {MAX_FORM_FIELDS} text parts")
    return BadRequest(f"the form cannot be read: {detail}")


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


def image_parts(form: FormData, target: Target) -> list[UploadFile]:
    """The pictures in the order of the form, as many as any of the tiers takes."""
    values = [value for name, value in form.multi_items() if name in IMAGE_PARTS]
    files = [value for value in values if isinstance(value, UploadFile)]
    if len(files) < len(values):
        raise BadReference("image must be a file part, with a filename", "image")
    if not files:
        raise BadReference("image is required", "image")
    if len(files) > target.max_references:
        raise BadReference(f"{target.name} takes at most {target.max_references} images", "image")
    return files


async def read_references(files: Iterable[UploadFile], limits: Limits) -> tuple[Raster, ...]:
    """The decoded pictures; decoding takes a while, so it is done off the event loop."""
    references = []
    for number, file in enumerate(files, start=1):
        data = await file.read(limits.max_image_bytes + 1)
        references.append(await asyncio.to_thread(decode, data, limits, f"image {number}"))
    return tuple(references)
